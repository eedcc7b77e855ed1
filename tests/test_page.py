"""The page without a browser: what it draws, what it asks of the model, and its error messages."""

import re
import shutil
import sys

import pytest

from tests.support.chromium import EN, ROOT, ZH
from tests.support.small_runs import CHAT, small_runs

SETTINGS = {
    "temperature": 0.0,
    "top_p": 0.5,
    "max_new_tokens": 3,
    "top_k": 7,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "frequency_penalty": -0.5,
    "presence_penalty": 0.5,
    "seed": 5,
}


def test_the_texts_are_complete_in_both_languages():
    assert EN.keys() == ZH.keys() and all(EN.values()) and all(ZH.values())
    files = [ROOT / "run_model.py", *(ROOT / "web").glob("*.py")]
    used = {key for file in files for key in re.findall(r"""\bt\[["'](\w+)["']\]""", file.read_text(encoding="utf-8"))}
    assert len(used) > 30 and used <= EN.keys()


def open_page(monkeypatch, *arguments):
    from streamlit.testing.v1 import AppTest

    monkeypatch.setattr(sys, "argv", ["run_model.py", *arguments])
    # AppTest puts the page there; a process that a later test starts would begin by running it
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    return AppTest.from_file(str(ROOT / "run_model.py"), default_timeout=60).run()


def control(page, name, t=EN):
    return next(one for one in [*page.slider, *page.number_input, *page.text_area] if one.label == t[name])


def values(page, t=EN):
    return {name: control(page, name, t).value for name in SETTINGS}


def test_the_page_reports_what_cannot_be_done(monkeypatch, tmp_path):
    empty = open_page(monkeypatch, f"--output_path={tmp_path}")
    assert empty.warning[0].value == EN["no_runs"] and not empty.exception

    shutil.copytree(next(small_runs().glob("sft_*")), tmp_path / "damaged")
    (tmp_path / "damaged" / "final" / "model.safetensors").write_bytes(b"short")
    damaged = open_page(monkeypatch, f"--output_path={tmp_path}")
    assert damaged.error[0].value == EN["cannot_load"] and "no valid checkpoint" in damaged.text[-1].value

    page = open_page(monkeypatch, f"--output_path={small_runs()}", "--temperature=0")
    page.chat_input[0].set_value("长" * 600).run()
    assert page.error[0].value == EN["cannot_answer"] and "shorten" in page.text[-1].value and not page.exception
    page.chat_input[0].set_value("谁写的").run()  # and the conversation continues
    assert page.text[-1].value == CHAT["谁写的"]


@pytest.mark.parametrize(
    "argument, why",
    [
        ("--temprature=1", "did you mean"),
        ("--temperature=warm", "expected float"),
        ("--temperature=-1", "at least 0"),
        ("--top_k=-1", "at least 0"),
        ("--top_p=1.5", "at most 1"),
        ("--min_p=-0.1", "at least 0"),
        ("--repetition_penalty=0", "above 0"),
        ("--frequency_penalty=3", "at least -2 and at most 2"),
        ("--presence_penalty=-3", "at least -2 and at most 2"),
        ("--max_new_tokens=0", "at least 1"),
        ("--seed=-1", "at least 0"),
        (f"--seed={2**60}", "a browser counts to"),
        (f"--top_k={2**60}", "a browser counts to"),
    ],
)
def test_a_wrong_setting_of_the_command_line_is_one_line_on_the_page(monkeypatch, argument, why):
    page = open_page(monkeypatch, f"--output_path={small_runs()}", argument)
    assert not page.exception and not page.chat_input and [error.value for error in page.error] == [EN["cannot_show"]]
    (message,) = (text.value for text in page.text)
    assert argument[2:].partition("=")[0] in message and why in message and "\n" not in message


def test_help_is_shown_and_the_page_comes_to_its_end(monkeypatch):
    assert "--repetition_penalty" in open_page(monkeypatch, "--help").code[0].value


def test_the_command_line_may_go_beyond_the_sliders(monkeypatch):
    page = open_page(
        monkeypatch,
        f"--output_path={small_runs()}",
        "--temperature=3",
        "--top_p=0.01",
        "--repetition_penalty=0.5",
        "--max_new_tokens=100000",
        f"--seed={2**53 - 1}",
    )
    assert not page.exception and not page.error
    shown = values(page)
    assert (shown["temperature"], shown["top_p"], shown["repetition_penalty"]) == (3, 0.01, 0.5)
    assert (shown["max_new_tokens"], shown["seed"]) == (512, 2**53 - 1)  # what the model takes


def test_every_setting_reaches_the_model_and_outlives_language_and_view(monkeypatch):
    from engine.inference import chat

    calls = []
    generate = chat.ChatModel.generate

    def record(self, messages, **settings):
        calls.append((messages, settings))
        return generate(self, messages, **settings)

    monkeypatch.setattr(chat.ChatModel, "generate", record)
    page = open_page(monkeypatch, f"--output_path={small_runs()}")
    for name, value in SETTINGS.items():
        control(page, name).set_value(value)
    control(page, "system").set_value(" be brief ")
    page.run()
    page.selectbox[0].set_value("中文").run()
    assert values(page, ZH) == SETTINGS
    view = page.get("button_group")[0]
    view.set_value("training").run()
    assert not page.chat_input and not page.exception
    page.get("button_group")[0].set_value("chat").run()
    page.chat_input[0].set_value("背一首春晓").run()
    assert calls == [([{"role": "system", "content": "be brief"}, {"role": "user", "content": "背一首春晓"}], SETTINGS)]
    assert any(caption.value.startswith("3 词元") for caption in page.caption) and not page.exception


def test_a_run_of_the_script_sets_no_unchanged_control(monkeypatch):
    """A value that the page sets would replace one that is being chosen in the browser at that moment."""
    page = open_page(monkeypatch, f"--output_path={small_runs()}")
    control(page, "temperature").set_value(0.3).run()
    settings = [*page.slider, *page.number_input, *page.text_area]
    assert len(settings) == len(SETTINGS) + 1 and not any(one.proto.set_value for one in settings)
