"""A Streamlit page in a headless Chromium, with the actions of a user and what they see.

Screenshots go to output/screenshots, or to the folder SCREENSHOTS.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from web.texts import TEXTS

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", ROOT / "output" / "screenshots"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900"
).split()
EN, ZH = TEXTS["English"], TEXTS["中文"]
IN_SHADOW = """
function find(node) {
  const found = node.shadowRoot?.querySelectorAll(arguments[1]);
  if (found?.length) return found;
  for (const child of node.children) { const deeper = find(child, arguments[1]); if (deeper) return deeper; }
  return null;
}
return [...(find(document.body, arguments[0]) || [])];
"""


def need(condition, what):
    """In CI a missing browser is a failure; elsewhere the test is skipped, with the reason."""
    if not condition:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            f"{what} is missing: apt-get install chromium chromium-driver fonts-noto-cjk; pip install selenium"
        )


@contextlib.contextmanager
def serve(home, script, *settings):
    """`streamlit run script -- settings`, with its files in the folder `home`: its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"

    def healthy():
        try:
            return server.poll() is None and urllib.request.urlopen(address + "/_stcore/health", timeout=2).read()
        except OSError:
            return False

    with open(home / "log", "w") as log:
        command = [sys.executable, "-m", "streamlit", "run", script, f"--server.port={port}", "--", "--device=cpu"]
        server = subprocess.Popen(
            [*command, *settings],
            cwd=ROOT,
            # without a compiler: building the decode step would take the cores from the browser
            env={**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "CXX": "no-compiler"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait(healthy, 30, lambda: (home / "log").read_text())
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(10)


@contextlib.contextmanager
def open_browser(profile, language="en-US"):
    """A Chromium with a profile of its own; what it downloads goes to profile/downloads."""
    need(CHROMIUM and DRIVER, "chromium or its driver")
    try:
        from selenium import webdriver
    except ImportError:
        need(False, "selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    for flag in (*FLAGS, f"--lang={language}", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(30)
    driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(profile / "downloads")}
    )
    try:
        yield driver
    finally:
        driver.quit()


def wait(condition, seconds=20, report=lambda: ""):
    """Poll until the condition holds, and return its value; elements may be redrawn meanwhile."""
    from selenium.common import exceptions

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            value = condition()
            if value:
                return value
        except (  # redrawn, under another element, or not drawn yet
            exceptions.StaleElementReferenceException,
            exceptions.ElementClickInterceptedException,
            exceptions.ElementNotInteractableException,
        ):
            pass
        time.sleep(0.05)
    pytest.fail(f"not within {seconds} s: {report()}")


def requests(driver):
    """The addresses that pages and their frames have asked for since the last call, but not Chromium's own pages."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [one["request"]["url"] for one in sent if not one["documentURL"].startswith("chrome")]


class Page:
    """The page at an address, in a fresh session of its own."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        wait(lambda: self.all('[data-testid="stChatInput"] textarea') and self.ended(), 40, self.text)

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def shadow(self, css):
        """Elements of our own component, which is in a shadow root."""
        return self.driver.execute_script(IN_SHADOW, css)

    def text(self):
        return self.driver.execute_script("return document.body.innerText")

    def texts(self, css):
        """The visible text of each of these elements; in one call, as a page may change between two."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(one => one.innerText)", css
        )

    def shows(self, *texts):
        """Wait until the page shows all of these."""
        wait(lambda: all(text in self.text() for text in texts), report=lambda: f"{texts} in {self.text()}")

    def send(self, text):
        """Send a message as if it were pasted: Chromium's driver types no character beyond 16 bits."""
        wait(self.ended)
        before = len(self.messages())

        def sent():  # the page may be redrawn, with an empty box, at any moment: also right after Enter
            if len(self.messages()) > before:
                return True
            box = self.all('[data-testid="stChatInput"] textarea')[0]
            if not box.get_attribute("value"):
                box.click()
                self.driver.execute_cdp_cmd("Input.insertText", {"text": text})
                return False
            box.send_keys("\ue007")  # Enter
            pressed = time.monotonic()
            while time.monotonic() < pressed + 5 and len(self.messages()) <= before:
                time.sleep(0.05)
            return False

        wait(sent, 40, self.text)
        wait(lambda: len(self.messages()) >= before + 2, report=self.text)

    def ask(self, text):
        """Send a message and wait for the full answer."""
        self.send(text)
        self.idle()

    def messages(self):
        """The text of each message."""
        return self.texts('[data-testid="stChatMessage"] [data-testid="stText"]')

    def captions(self):
        return self.texts('[data-testid="stChatMessage"] [data-testid="stCaptionContainer"]')

    def ended(self):
        return self.all('[data-test-script-state="notRunning"]')

    def idle(self):
        """Wait until the script has ended and the last message is answered: before that, old elements linger."""
        again = EN["regenerate"], ZH["regenerate"]
        wait(lambda: self.ended() and any(map(self.button, again)), report=self.text)

    def button(self, name):
        ours = self.all('button:not([data-testid="stBaseButton-header"])')  # Streamlit's own Stop is in the header
        return next((button for button in ours if button.text.strip().endswith(name)), None)

    def click(self, name):
        """Click it by the mouse, scrolled away from the message box: a growing answer moves it there."""

        def clicked():
            found = self.button(name)
            if found is not None:
                self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
                found.click()
            return found is not None

        wait(clicked, report=self.text)

    def click_first(self, css):
        """Click the first element of a selector by the mouse, away from the header and the message box."""

        def clicked():
            found = self.all(css)
            if found:
                self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found[0])
                found[0].click()
            return bool(found)

        wait(clicked, report=self.text)

    def press(self, name, css="button"):
        """Click the element with the text `name`, which the message box may cover."""
        found = wait(lambda: next((one for one in self.all(css) if name in one.text), None), report=self.text)
        self.driver.execute_script("arguments[0].click()", found)

    def unfold(self, name):
        """Open the folded part with this name, again if the page is redrawn meanwhile."""

        def opened():
            part = next((one for one in self.all("details") if name in one.text), None)
            if part is None or part.get_attribute("open") is not None:
                return part is not None
            self.driver.execute_script("arguments[0].click()", part.find_element("css selector", "summary"))
            time.sleep(0.5)

        wait(opened, report=self.text)

    def choose(self, number, option):
        """Pick an option of a select box of the sidebar by a part of its text."""
        boxes = '[data-testid="stSidebar"] [data-testid="stSelectbox"] input'
        wait(lambda: self.all(boxes)[number].click() or True, report=self.text)

        def picked():
            found = next((one for one in self.all('[role="option"]') if option in one.text), None)
            if found is not None:
                found.click()
            return found is not None

        wait(picked, report=self.text)

    def shoot(self, name):
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        assert self.driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))
