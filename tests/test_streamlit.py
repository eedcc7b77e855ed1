"""The page in a real headless Chromium: every control, two browsers at once, both themes, and text that stays text."""

import functools
import http.server
import json
import shutil
import threading
import time

import pytest

from engine.inference.chat import open_chat_model
from tests.support.chromium import EN, ZH, Page, open_browser, requests, serve, wait
from tests.support.payloads import MARKUP, PAYLOADS, RUN, SITE
from tests.support.small_runs import CHAT, small_runs
from utils.terminal import strip_control_chars

pytestmark = pytest.mark.slow
MARKED = "script img iframe object embed video audio link style base a strong em h1 li code table .katex math".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def page(home):
    """The address of the page over the two small runs."""
    with serve(
        home, "run_model.py", f"--output_path={small_runs()}", "--temperature=0", "--max_new_tokens=2000"
    ) as address:
        yield address


@pytest.fixture(scope="module")
def parrot(home):
    """The address of a page whose model answers each message with that message; the run's own files are markup too."""
    run = home / "runs" / MARKUP
    shutil.copytree(next(small_runs().glob("sft_*")), run)
    for name in ("config.yaml", "run.json"):
        with open(run / name, "a", encoding="utf-8") as file:
            file.write("".join(f"# {payload!r}\n" for payload in PAYLOADS))
    with serve(home, "tests/support/parrot_page.py", f"--output_path={run.parent}", "--temperature=0") as address:
        yield address


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="module")
def chromium(profile):
    with open_browser(profile) as driver:
        yield driver


@pytest.fixture()
def browser(chromium):
    """The one browser of all tests, in a window of the test's own."""
    first = chromium.current_window_handle
    chromium.switch_to.new_window("tab")
    yield chromium
    chromium.close()
    chromium.switch_to.window(first)


@pytest.fixture()
def downloads(profile):
    return lambda: sorted(file for file in (profile / "downloads").glob("*") if file.suffix != ".crdownload")


def is_moe(stage):
    with open_chat_model(next(small_runs().glob(f"{stage}_*")), "cpu") as chat_model:
        return chat_model.reports_expert_load


def dark(driver):
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )


def test_a_conversation(page, browser):
    view = Page(browser, page)
    view.shows(EN["welcome_chat"])
    assert " · sft · " in view.all('[data-testid="stSelectbox"] input')[1].get_attribute("value")  # it can chat: first
    view.ask("背一首春晓")
    assert view.messages() == ["背一首春晓", CHAT["背一首春晓"]]
    view.ask("谁写的")
    assert view.messages()[2:] == ["谁写的", CHAT["谁写的"]]  # the second turn
    view.shows(EN["tokens_per_s"], EN["first_token"])
    view.shoot("chat")

    figures = view.captions()[-1]
    view.click(EN["regenerate"])
    wait(lambda: view.captions()[-1:] not in ([], [figures]), report=view.text)  # how long it took differs
    view.idle()
    assert view.messages()[2:] == ["谁写的", CHAT["谁写的"]]
    view.choose(0, "中文")
    view.shows(ZH["temperature"], ZH["regenerate"])
    view.idle()
    assert len(view.messages()) == 4
    view.shoot("chat_zh")
    view.click(ZH["clear"])
    wait(lambda: not view.messages())


def test_stop_keeps_what_was_written(page, browser):
    view = Page(browser, page)
    view.choose(1, "pretrain")
    view.shows(EN["welcome_base"])
    view.send("春眠")
    lengths = set()
    wait(lambda: lengths.add(len(view.messages()[1])) or len(lengths) > 2, report=view.text)  # it grows as we look
    view.click(EN["stop"])
    view.idle()
    kept = view.messages()[1]
    assert len(kept) >= max(lengths) - 1 and not kept.endswith("▍")
    view.shows(EN["stopped"])
    view.send("春眠不觉晓")  # and once more: the first is still there
    view.click(EN["stop"])
    view.idle()
    assert view.messages()[:2] == ["春眠", kept] and len(view.messages()) == 4
    view.choose(1, "sft")  # each run has its conversation
    view.shows(EN["welcome_chat"])
    view.choose(1, "pretrain")
    wait(lambda: view.messages()[:2] == ["春眠", kept], report=view.text)


def test_edit_compare_and_inspect(page, browser, downloads):
    from selenium.webdriver import ActionChains, Keys

    view = Page(browser, page)
    for text in ("hello", "谁写的"):
        view.ask(text)
    assert view.messages()[1] == CHAT["hello"]

    view.click_first('[data-testid="stChatMessage"] [data-testid="stPopover"] button')  # edit the first
    box = wait(lambda: view.all('[data-testid="stPopoverBody"] textarea'), report=view.text)[0]
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("背一首春晓")
    view.shoot("edit")
    view.click(EN["send"])
    wait(lambda: view.messages() == ["背一首春晓", CHAT["背一首春晓"]], report=view.text)  # what followed is gone
    view.idle()

    view.click(EN["probabilities"])
    tokens = wait(lambda: view.shadow(".token"), report=view.text)
    assert "".join(token.text for token in tokens if token.text != "·") == CHAT["背一首春晓"].replace("\n", "")
    ActionChains(browser).move_to_element(tokens[0]).perform()
    rows = wait(lambda: [row for row in view.shadow(".row") if row.is_displayed()], report=view.text)
    assert len(rows) == 8 and "%" in rows[0].text
    view.shoot("probabilities")
    tokens[1].click()  # stays when we leave
    ActionChains(browser).move_to_element(view.all("h3")[0]).perform()
    assert any(row.is_displayed() for row in view.shadow(".row"))
    tokens[1].click()

    view.press(EN["export"])
    view.press("JSON Lines")
    view.press("Markdown")
    kept = wait(lambda: len(downloads()) == 2 and downloads())
    assert json.loads(kept[0].read_text(encoding="utf-8"))["messages"][1]["content"] == CHAT["背一首春晓"]
    assert "春眠不觉晓" in kept[1].read_text(encoding="utf-8")
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()

    view.all('[data-testid="stSidebar"] [data-testid="stCheckbox"] label')[0].click()  # compare two
    view.shows(EN["other_run"], EN["welcome_chat"])
    view.send("春眠")
    view.click(EN["stop"])  # the base model would go on to its last token
    view.idle()
    assert len(view.all('[data-testid="stChatMessage"]')) == 3
    names = [text for text in view.messages() if " · " in text]
    assert len(names) == 2 and " · sft · " in names[0] and " · pretrain · " in names[1]
    view.shoot("compare")


def test_the_second_model_is_the_one_chosen(home, browser):
    runs = shutil.copytree(small_runs(), home / "three")
    shutil.copytree(next(runs.glob("sft_*")), runs / "once_more")
    with serve(home, "run_model.py", f"--output_path={runs}", "--temperature=0") as address:
        view = Page(browser, address)
        view.all('[data-testid="stSidebar"] [data-testid="stCheckbox"] label')[0].click()
        view.shows(EN["other_run"])
        chosen = view.all('[data-testid="stSelectbox"] input')[1].get_attribute("value")
        view.choose(2, "pretrain")
        wait(lambda: " · pretrain" in view.all('[data-testid="stSelectbox"] input')[2].get_attribute("value"))
        wait(view.ended)
        view.choose(2, "sft")
        wait(lambda: " · sft" in view.all('[data-testid="stSelectbox"] input')[2].get_attribute("value"))
        view.ask("谁写的")
        question, first, answer, second, other = view.messages()
        assert (question, answer, other) == ("谁写的", CHAT["谁写的"], CHAT["谁写的"])
        assert chosen in first and second != first and sum("once_more" in name for name in (first, second)) == 1


def test_the_experts_of_an_moe(page, browser):
    view = Page(browser, page)
    stages = [stage for stage in ("sft", "pretrain") if is_moe(stage)]
    assert stages
    view.choose(1, stages[0])
    wait(view.ended)
    view.send("春眠")
    view.click(EN["stop"])
    view.idle()
    view.click(EN["experts"])
    tables = wait(
        lambda: (
            len(view.all('[data-testid="stDataFrame"]')) == 2
            and view.ended()
            and view.all('[data-testid="stDataFrame"]')
        ),
        40,
        view.text,
    )
    cells = wait(lambda: tables[0].find_elements("css selector", "canvas td"))  # as a screen reader gets them
    shares = [cell.get_attribute("textContent") for cell in cells]
    assert sum(map(float, shares[1:])) == pytest.approx(1), shares  # the first layer's, behind its name
    view.shoot("experts")


def test_the_training_tab(page, browser):
    view = Page(browser, page)
    view.click(EN["training"])
    view.shows(EN["curve_loss"], EN["curve_lr"], "config.yaml")
    lines = wait(
        lambda: (
            len(view.all('[aria-roledescription="line mark"]')) == 2 and view.all('[aria-roledescription="line mark"]')
        ),
        report=view.text,
    )
    assert [line.get_attribute("d").count("L") for line in lines] == [89, 89]  # 90 steps, 89 strokes
    view.unfold("config.yaml")
    view.shows("model_name", "stage: sft")
    view.shoot("training")


def test_two_browsers_see_nothing_of_each_other(page, browser, tmp_path):
    """Two people at once, on the same loaded models, one of them with a Chinese browser."""
    with open_browser(tmp_path, "zh-CN") as other:
        here, there = Page(browser, page), Page(other, page)
        there.shows(ZH["welcome_chat"])  # the browser's language, until another is chosen
        here.ask("背一首春晓")
        here.all('[data-testid="stSidebar"] textarea')[0].send_keys("only mine")
        here.all('[data-testid="stSidebar"] textarea')[0].send_keys("\ue009\ue007")  # Ctrl+Enter
        assert there.messages() == []
        there.choose(1, "pretrain")
        there.shows(ZH["welcome_base"])
        there.send("春眠")  # it goes on and on, and meanwhile:
        here.ask("谁写的")
        assert here.messages()[:3] == ["背一首春晓", CHAT["背一首春晓"], "谁写的"]
        assert here.messages()[3] and len(here.messages()) == 4
        there.click(ZH["stop"])
        there.idle()
        assert there.messages()[0] == "春眠" and len(there.messages()) == 2
        there.choose(1, "sft")
        there.shows(ZH["welcome_chat"])
        assert there.messages() == []
        assert there.all('[data-testid="stSidebar"] textarea')[0].get_attribute("value") == ""
        there.ask("hello")
        assert there.messages() == ["hello", CHAT["hello"]]
        there.click(ZH["clear"])
        wait(lambda: not there.messages())
        assert len(here.messages()) == 4
        browser.refresh()  # a new session, even of the same browser
        wait(lambda: here.ended() and here.all('[data-testid="stChatInput"] textarea'), 40, here.text)
        assert here.messages() == []


def darkness(view):
    """The largest of red, green and blue of the page's background, and the smallest of its text."""

    def colour(name):
        value = view.all('[data-testid="stApp"]')[0].value_of_css_property(name)
        return [int(part) for part in value[value.index("(") + 1 :].rstrip(")").split(",")[:3]]

    return max(colour("background-color")), min(colour("color"))


def test_both_themes_by_the_system_and_by_the_menu(page, browser):
    view = Page(browser, page)
    assert darkness(view)[0] > 240 and darkness(view)[1] < 64
    dark(browser)
    wait(lambda: darkness(view)[0] < 64 and darkness(view)[1] > 200, report=view.text)
    view.choose(0, "中文")
    view.shows(ZH["temperature"])
    view.ask("背一首春晓")
    view.click(ZH["probabilities"])
    wait(lambda: view.shadow(".token"), report=view.text)
    view.shoot("dark_zh")
    view.press(ZH["training"])
    view.shows(ZH["curve_loss"], "config.yaml")
    wait(lambda: len(view.all('[aria-roledescription="line mark"]')) == 2, report=view.text)
    view.unfold("config.yaml")
    view.shows("stage: sft")
    view.shoot("dark_training_zh")
    try:
        for theme, is_dark in (("Light", False), ("Dark", True)):  # against the system, and with it
            wait(
                lambda theme=theme: (
                    view.all(f'[data-testid="stMainMenuItem-theme-{theme}"]')
                    or view.all('[data-testid="stMainMenuButton"]')[0].click()
                )
            )[0].click()
            wait(lambda is_dark=is_dark: (darkness(view)[0] < 64) == is_dark, report=view.text)
    finally:
        browser.execute_script("localStorage.clear()")  # where the choice is kept


def test_every_setting_is_moved_by_hand_and_reaches_the_model(parrot, browser, home):
    from selenium.webdriver import ActionChains, Keys

    view = Page(browser, parrot)
    view.press(EN["more"], "summary")
    wait(lambda: [one for one in view.all(f'input[aria-label="{EN["seed"]}"]') if one.is_displayed()], report=view.text)
    wanted = {}
    for name in (
        "temperature",
        "top_p",
        "max_new_tokens",
        "min_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
    ):

        def thumb(name=name):
            return view.all(f'input[type="range"][aria-label="{EN[name]}"]')

        before = wait(thumb, report=view.text)[0].get_attribute("value")
        browser.execute_script("arguments[0].focus()", thumb()[0])
        key = Keys.ARROW_LEFT if name in ("top_p", "max_new_tokens") else Keys.ARROW_RIGHT
        ActionChains(browser).send_keys(key).perform()
        wait(lambda thumb=thumb, before=before: thumb()[0].get_attribute("value") != before, report=view.text)
        wanted[name] = float(thumb()[0].get_attribute("value"))
    for name, value in (("top_k", 3), ("seed", 5)):
        field = view.all(f'input[aria-label="{EN[name]}"]')[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.ENTER)
        wanted[name] = value
    system = view.all('[data-testid="stSidebar"] textarea')[0]
    system.send_keys("be brief", Keys.CONTROL, Keys.ENTER)
    time.sleep(0.5)
    wait(view.ended)
    view.shoot("settings")
    view.choose(0, "中文")
    view.shows(ZH["temperature"])
    view.choose(0, "English")
    view.click(EN["training"])  # there and back: nothing is forgotten
    view.shows("config.yaml")
    view.click(EN["chat"])
    wait(lambda: view.all('[data-testid="stChatInput"] textarea'))
    view.ask("hello")
    messages, settings = json.loads((home / "calls.jsonl").read_text().splitlines()[-1])
    assert messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert settings == pytest.approx(wanted)


def test_no_text_is_more_than_text(parrot, browser):
    """As a prompt, as what the model writes, and as the tokens it is shown by: nothing runs, nothing is loaded."""
    assert len(PAYLOADS) >= 60
    requests(browser)
    view = Page(browser, parrot)
    title = browser.title
    for number, payload in enumerate(PAYLOADS):
        view.send(payload)
        asked = strip_control_chars(payload).strip()
        reply = asked.partition("</think>")[2] or asked  # the reasoning is folded

        def written(asked=asked, reply=reply):
            shown = [text.strip() for text in view.messages() if text]
            return shown[-2:] == [asked, reply] and view.ended()

        wait(written, report=lambda: str(view.messages()[-2:]))
        if number % 6 == 5:
            view.press(EN["probabilities"])
            wait(lambda: view.shadow(".token"), report=view.text)
            look(view, title)
            view.press(EN["clear"])
            wait(lambda: not view.messages() and view.ended(), report=view.text)
    look(view, title)
    assert RUN not in view.messages()  # the reasoning is folded
    view.press(EN["reasoning"], "summary")
    wait(lambda: RUN in view.messages(), report=view.text)
    view.shoot("payloads")
    view.press(EN["experts"])
    wait(lambda: view.all('[data-testid="stDataFrame"]') and view.ended(), report=view.text)
    kind = view.all('[data-testid="stChatMessage"] [data-testid="stSelectbox"] input')[-1]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", kind)
    options = wait(lambda: view.all('[role="option"]') or kind.click())  # it may be redrawn under a click
    assert MARKUP in options[1].text
    options[1].click()
    wait(view.ended)
    look(view, title)
    view.press(EN["training"])
    for name in ("config.yaml", "run.json"):
        view.press(name, "summary")
    view.shows(RUN)
    look(view, title)
    addresses = requests(browser)
    assert addresses and foreign(addresses, parrot) == []
    assert not [url for url in addresses if url.endswith(("/x", "/x.png"))]


def look(view, title):
    inside, ours = '[data-testid="stChatMessageContent"] ', ':not([data-testid="stDataFrame"] *)'  # our own tables
    assert [tag for tag in MARKED if view.all(inside + tag + ours)] == []
    assert not view.shadow(".tokens :not(span):not(div)")
    assert view.driver.title == title and view.driver.execute_script("return window.owned === undefined")


def foreign(addresses, own):
    """The addresses that are not on the page's own server."""
    ours = own + "/", own.replace("http", "ws") + "/", "data:", "blob:"
    return [url for url in addresses if not url.startswith(ours)]


def test_the_payloads_do_something_where_text_is_taken_for_markup(browser, tmp_path):
    """The test can fail: on a page that trusts its text, scripts run and other hosts are contacted."""
    for number, payload in enumerate(PAYLOADS):
        (tmp_path / f"{number}.html").write_text(f"<!doctype html><meta charset=utf-8><body><div>{payload}</div>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = f"http://127.0.0.1:{server.server_port}"
        ran, asked = 0, []
        requests(browser)
        for number in range(len(PAYLOADS)):
            browser.get(f"{own}/{number}.html")
            time.sleep(0.05)  # a page that goes elsewhere by itself
            ran += browser.execute_script("return window.owned === 1")
            asked += foreign(requests(browser), own)
        server.shutdown()
    assert ran >= 12, ran
    assert {f"{SITE}/{name}" for name in ("a.css", "b.css", "c", "a.png", "b.png", "c.png")} <= {*asked}
