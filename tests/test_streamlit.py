"""The page in a real headless Chromium: choose a run, talk, stop, and nothing a model writes is more than text.

Screenshots go to output/screenshots, or where SCREENSHOTS says.
"""
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from small_runs import CHAT, POISON, small_runs

from utils.page_texts import TEXTS
from utils.terminal import harmless

ROOT = Path(__file__).resolve().parents[1]
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", ROOT / "output" / "screenshots"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --disable-dev-shm-usage "
         "--window-size=1280,900 --lang=en-US").split()
EN, ZH = TEXTS["English"], TEXTS["中文"]


def need(condition, what):
    """In CI a missing browser is a failure; elsewhere the test is left out, and says why."""
    if not condition:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            f"{what} is missing: apt-get install chromium chromium-driver fonts-noto-cjk; pip install selenium")


def test_the_texts_are_complete_in_both_languages():
    assert EN.keys() == ZH.keys() and all(EN.values()) and all(ZH.values())
    files = [ROOT / "run_model.py", *(ROOT / "page").glob("*.py")]
    used = {key for file in files for key in re.findall(r"""say\[["'](\w+)["']\]""", file.read_text(encoding="utf-8"))}
    assert used <= EN.keys()


def open_page(monkeypatch, *arguments):
    """The page without a browser: what it draws, and nothing of how."""
    from streamlit.testing.v1 import AppTest
    monkeypatch.setattr(sys, "argv", ["run_model.py", *arguments])
    # AppTest puts the page there; a process that a later test starts would begin by running it
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    return AppTest.from_file(str(ROOT / "run_model.py"), default_timeout=60).run()


def test_what_cannot_be_done_is_told_on_the_page(monkeypatch, tmp_path):
    empty = open_page(monkeypatch, f"--output_path={tmp_path}")
    assert empty.warning[0].value == EN["no_runs"] and not empty.exception
    assert "did you mean" in open_page(monkeypatch, "--temprature=1").text[0].value

    shutil.copytree(next(small_runs().glob("sft_*")), tmp_path / "damaged")
    (tmp_path / "damaged" / "final" / "model.safetensors").write_bytes(b"short")
    damaged = open_page(monkeypatch, f"--output_path={tmp_path}")
    assert damaged.error[0].value == EN["cannot_load"] and "no valid checkpoint" in damaged.text[-1].value

    talk = open_page(monkeypatch, f"--output_path={small_runs()}", "--temperature=0")
    talk.chat_input[0].set_value("长" * 600).run()
    assert talk.error[0].value == EN["cannot"] and "shorten" in talk.text[-1].value and not talk.exception
    talk.chat_input[0].set_value("谁写的").run()                              # and the conversation goes on
    assert talk.text[-1].value == CHAT["谁写的"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of a running page over the two small runs."""
    home, port = tmp_path_factory.mktemp("home"), free_port()
    with open(home / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "streamlit", "run", "run_model.py", f"--server.port={port}", "--", "--temperature=0",
             f"--output_path={small_runs()}", "--max_new_tokens=2000", "--device=cpu"],
            cwd=ROOT, env={**os.environ, "HOME": str(home)}, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        wait(lambda: server.poll() is None and healthy(address), 30, lambda: (home / "log").read_text())
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(10)


@pytest.fixture()
def browser(tmp_path):
    need(CHROMIUM and DRIVER, "chromium or its driver")
    try:
        from selenium import webdriver
    except ImportError:
        need(False, "selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def healthy(address):
    try:
        return urllib.request.urlopen(address + "/_stcore/health", timeout=2).status == 200
    except OSError:
        return False


def wait(condition, seconds=20, report=lambda: ""):
    """Poll until the condition holds, and return what it gave; elements may be redrawn while we look at them."""
    from selenium.common.exceptions import StaleElementReferenceException
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            value = condition()
            if value:
                return value
        except StaleElementReferenceException:
            pass
        time.sleep(0.05)
    pytest.fail(f"not within {seconds} s: {report()}")


class Page:
    """What a person does and sees."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        wait(lambda: self.all('[data-testid="stChatInput"] textarea') and self.ended(), 40, self.text)

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def text(self):
        return self.driver.find_element("css selector", "body").text

    def say(self, text):
        before = len(self.messages())
        box = self.all('[data-testid="stChatInput"] textarea')[0]
        box.send_keys(text)
        box.send_keys("\ue007")                     # Enter
        wait(lambda: len(self.messages()) >= before + 2, report=self.text)

    def messages(self):
        """What stands in each bubble, as one sees it."""
        return [m.text for m in self.all('[data-testid="stChatMessage"] [data-testid="stText"]')]

    def captions(self):
        return [c.text for c in self.all('[data-testid="stChatMessage"] [data-testid="stCaptionContainer"]')]

    def ended(self):
        return self.all('[data-test-script-state="notRunning"]')

    def idle(self):
        """Wait until every message has its answer and the script has ended: before that, old elements linger."""
        wait(lambda: len(self.messages()) % 2 == 0 and self.ended()
             and (self.button(EN["regenerate"]) or self.button(ZH["regenerate"])), report=self.text)

    def button(self, name):
        return next((b for b in self.all("button") if b.text.strip().endswith(name)), None)

    def click(self, name):
        wait(lambda: self.button(name), report=self.text).click()

    def choose(self, number, option):
        """Pick an option of a select box of the sidebar by a part of its text."""
        self.all('[data-testid="stSidebar"] [data-testid="stSelectbox"] input')[number].click()
        wait(lambda: next((o for o in self.all('[role="option"]') if option in o.text), None), report=self.text).click()

    def shoot(self, name):
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        assert self.driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


def test_a_conversation(page, browser):
    view = Page(browser, page)
    assert EN["chat_welcome"] in view.text()
    assert " · sft · " in view.all('[data-testid="stSelectbox"] input')[1].get_attribute("value")   # it can chat: first
    view.say("背一首春晓")
    view.idle()
    assert view.messages() == ["背一首春晓", CHAT["背一首春晓"]]
    view.say("谁写的")
    view.idle()
    assert view.messages()[2:] == ["谁写的", CHAT["谁写的"]]                  # the second turn
    assert EN["tokens_per_s"] in view.text() and EN["first"] in view.text()
    view.shoot("chat")

    figures = view.captions()[-1]
    view.click(EN["regenerate"])
    wait(lambda: view.captions()[-1:] not in ([], [figures]), report=view.text)       # how long it took differs
    view.idle()
    assert view.messages()[2:] == ["谁写的", CHAT["谁写的"]]
    view.choose(0, "中文")
    wait(lambda: ZH["temperature"] in view.text() and ZH["regenerate"] in view.text(), report=view.text)
    view.idle()
    assert len(view.messages()) == 4
    view.shoot("chat_zh")

    view.driver.switch_to.new_window("tab")                                 # another session sees nothing of this one
    assert Page(browser, page).messages() == []
    view.driver.switch_to.window(view.driver.window_handles[0])
    assert len(view.messages()) == 4
    view.click(ZH["clear"])
    wait(lambda: not view.messages())


def test_stop_keeps_what_was_written(page, browser):
    view = Page(browser, page)
    view.choose(1, "pretrain")
    wait(lambda: EN["base_welcome"] in view.text(), report=view.text)
    view.say("春眠")
    lengths = set()
    wait(lambda: lengths.add(len(view.messages()[1])) or len(lengths) > 3, report=view.text)      # it grows as we look
    view.shoot("streaming")
    view.click(EN["stop"])
    view.idle()
    kept = view.messages()[1]
    assert len(kept) >= max(lengths) - 1 and not kept.endswith("▍")
    assert EN["stopped"] in view.text()
    view.say("春眠不觉晓")                                                  # and once more: the first is still there
    view.click(EN["stop"])
    view.idle()
    assert view.messages()[:2] == ["春眠", kept] and len(view.messages()) == 4
    view.choose(1, "sft")                                                   # each run has its conversation
    wait(lambda: EN["chat_welcome"] in view.text(), report=view.text)
    view.choose(1, "pretrain")
    wait(lambda: view.messages()[:2] == ["春眠", kept], report=view.text)


def test_what_is_written_is_only_text(page, browser):
    view = Page(browser, page)
    title = browser.title
    for ask in ("payload", harmless(POISON)):
        view.say(ask)
        view.idle()
    assert view.messages()[1] == harmless(POISON) and view.messages()[2] == harmless(POISON)
    inside = '[data-testid="stChatMessageContent"] '
    assert not [tag for tag in ("script", "img", "a", "strong", ".katex") if view.all(inside + tag)]
    assert browser.title == title
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded and [name for name in loaded if not name.startswith((page, "data:", "blob:"))] == []
    assert not [name for name in loaded if name.endswith(("/x", "x.png"))]
    view.shoot("payload")
