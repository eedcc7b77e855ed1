"""What is on the page in a real headless Chromium: editing, comparing, looking inside, export, the dark theme."""
import json

import pytest
from small_runs import CHAT, small_runs
from test_streamlit import EN, Page, browser, open_page, page, wait  # noqa: F401

TOKENS = """
function find(node) {
  const found = node.shadowRoot?.querySelectorAll(arguments[1]);
  if (found?.length) return found;
  for (const child of node.children) { const deeper = find(child, arguments[1]); if (deeper) return deeper; }
  return null;
}
return [...(find(document.body, arguments[0]) || [])];
"""


def press(view, name, css="button"):
    """Click a button or an expander that may stand behind the message box, by what is written on it."""
    found = wait(lambda: next((one for one in view.all(css) if name in one.text), None), report=view.text)
    view.driver.execute_script("arguments[0].click()", found)


def inside(view, css):
    """Elements of our component, which stands in a shadow root."""
    return view.driver.execute_script(TOKENS, css)


def asked_of(monkeypatch):
    """Every setting of the side, changed on a page without a browser: what the model was asked for."""
    from engine import chat
    asked, answer = [], chat.Speaker.answer

    def listen(self, messages, **settings):
        asked.append((messages, settings))
        return answer(self, messages, **settings)
    monkeypatch.setattr(chat.Speaker, "answer", listen)
    return asked


def test_every_setting_reaches_the_model(monkeypatch):
    asked = asked_of(monkeypatch)
    talk = open_page(monkeypatch, f"--output_path={small_runs()}")
    wanted = {"temperature": 0.0, "top_p": 0.5, "max_new_tokens": 3, "top_k": 7, "min_p": 0.1,
              "repetition_penalty": 1.1, "frequency_penalty": -0.5, "presence_penalty": 0.5, "seed": 5}
    for name, value in wanted.items():
        next(one for one in [*talk.slider, *talk.number_input] if one.label == EN[name]).set_value(value)
    talk.text_area(key="system").set_value(" be brief ")
    talk.chat_input[0].set_value("背一首春晓").run()
    assert asked == [([{"role": "system", "content": "be brief"}, {"role": "user", "content": "背一首春晓"}], wanted)]
    assert any(caption.value.startswith("3 tokens") for caption in talk.caption) and not talk.exception


@pytest.mark.slow
def test_edit_compare_and_look_inside(page, browser, tmp_path):  # noqa: F811
    from selenium.webdriver import ActionChains, Keys
    view = Page(browser, page)
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    for text in ("hello", "谁写的"):
        view.say(text)
        view.idle()
    assert view.messages()[1] == CHAT["hello"]

    view.all('[data-testid="stChatMessage"] [data-testid="stPopover"] button')[0].click()          # edit the first
    box = wait(lambda: view.all('[data-testid="stPopoverBody"] textarea'), report=view.text)[0]
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("背一首春晓")
    view.click(EN["send"])
    wait(lambda: view.messages()[:1] == ["背一首春晓"], report=view.text)
    view.idle()
    assert view.messages() == ["背一首春晓", CHAT["背一首春晓"]]                # what followed is gone

    view.click(EN["probabilities"])
    words = wait(lambda: inside(view, ".token"), report=view.text)
    assert "".join(word.text for word in words if word.text != "·") == CHAT["背一首春晓"].replace("\n", "")
    ActionChains(browser).move_to_element(words[0]).perform()
    rows = wait(lambda: [row for row in inside(view, ".row") if row.is_displayed()], report=view.text)
    assert len(rows) == 8 and "%" in rows[0].text
    view.shoot("probabilities")
    words[1].click()                                                                              # stays when we leave
    ActionChains(browser).move_to_element(view.all("h3")[0]).perform()
    assert any(row.is_displayed() for row in inside(view, ".row"))
    words[1].click()

    press(view, EN["export"])
    press(view, "JSON Lines")
    press(view, "Markdown")
    kept = wait(lambda: sorted(tmp_path.glob("conversation.*")) if len(list(tmp_path.glob("conversation.*"))) == 2
                and not list(tmp_path.glob("*.crdownload")) else None)
    assert json.loads(kept[0].read_text(encoding="utf-8"))["messages"][1]["content"] == CHAT["背一首春晓"]
    assert "春眠不觉晓" in kept[1].read_text(encoding="utf-8")
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()

    view.all('[data-testid="stSidebar"] [data-testid="stCheckbox"] label')[0].click()              # compare two
    wait(lambda: EN["other"] in view.text() and EN["chat_welcome"] in view.text(), report=view.text)
    view.say("春眠")
    view.click(EN["stop"])                                        # the base model would go on to its last token
    wait(lambda: view.button(EN["regenerate"]) and view.ended(), report=view.text)
    assert len(view.all('[data-testid="stChatMessage"]')) == 3
    names = [text for text in view.messages() if " · " in text]
    assert len(names) == 2 and " · sft · " in names[0] and " · pretrain · " in names[1]
    view.shoot("compare")


@pytest.mark.slow
def test_the_dark_theme(page, browser):  # noqa: F811
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                            {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    view = Page(browser, page)
    view.say("背一首春晓")
    view.idle()
    colour = view.all('[data-testid="stApp"]')[0].value_of_css_property("background-color")
    assert max(map(int, colour[colour.index("(") + 1:].rstrip(")").split(",")[:3])) < 64, colour
    view.click(EN["probabilities"])
    wait(lambda: inside(view, ".token"), report=view.text)
    view.shoot("dark")
