"""The conversation with one run, or with two side by side.

st.session_state holds one conversation (a list of `Exchange`) per choice of runs, for one browser session only.
"""

import time
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from utils.errors import UserError
from utils.terminal import strip_control_chars
from web.exchange import Answer, Exchange, history
from web.export import show_export
from web.inspect_view import N_TOP, show_inspection
from web.stats import stats_line
from web.texts import Texts

if TYPE_CHECKING:  # torch comes with it, and takes seconds
    from engine.inference.chat import ChatModel, Generation

REFRESH_SECONDS = 0.05  # between two updates of a streaming answer
CURSOR = "▍"
AVATARS = {"user": ":material/person:", "assistant": ":material/auto_awesome:"}


def show_chat(
    t: Texts, names: list[str], chat_models: "list[ChatModel]", settings: dict[str, Any], system: str
) -> None:
    """Draw the conversation with these runs, called `names`, and answer a new message."""
    exchanges = st.session_state.setdefault("conversations", {}).setdefault(tuple(names), [])
    is_base = all(chat_model.is_base for chat_model in chat_models)
    text = st.chat_input(t["prompt_base" if is_base else "prompt_chat"])
    if text:
        exchanges.append({"prompt": text, "answers": []})
    if not exchanges:
        st.subheader(t["title_base" if is_base else "title_chat"])
        st.caption(t["welcome_base" if is_base else "welcome_chat"])
        return
    for number, exchange in enumerate(exchanges):
        show_prompt(t, exchanges, number)
        if exchange["answers"]:
            for name, chat_model, answer, box in zip(names, chat_models, exchange["answers"], answer_boxes(names)):
                with box:
                    show_answer(t, chat_model, answer, f"{number}:{len(names)}:{name}")
    if not exchanges[-1]["answers"]:
        generate_answers(t, names, chat_models, exchanges, settings, system)
        st.rerun()  # draws the finished answers with their statistics and buttons
    show_buttons(t, names, exchanges, system)


def show_buttons(t: Texts, names: list[str], exchanges: list[Exchange], system: str) -> None:
    again, clear, save, _ = st.columns([2, 2, 2, 3], vertical_alignment="center")
    again.button(
        t["regenerate"], icon=":material/refresh:", on_click=remove_last_answers, args=(exchanges,), type="tertiary"
    )
    clear.button(t["clear"], icon=":material/edit_square:", on_click=exchanges.clear, type="tertiary")
    with save:
        show_export(t, names, exchanges, system)


def remove_last_answers(exchanges: list[Exchange]) -> None:
    """Make the next run of the script generate the last answers again."""
    exchanges[-1]["answers"] = []


def answer_boxes(names: list[str]) -> Iterator[DeltaGenerator]:
    """The containers of the answers: the full width for one run, titled columns for two."""
    columns = st.columns(len(names)) if len(names) > 1 else [st.container()]
    for name, column in zip(names, columns):
        box = column.chat_message("assistant", avatar=AVATARS["assistant"])
        if len(names) > 1:
            box.text(name)  # st.text: the name of a folder is untrusted
        yield box


def show_prompt(t: Texts, exchanges: list[Exchange], number: int) -> None:
    """A user's message with its editor; sending an edited message removes all exchanges after it."""
    prompt = exchanges[number]["prompt"]
    key = f"edit:{number}:{zlib.crc32(prompt.encode())}"  # another message gets a new, closed editor
    with st.chat_message("user", avatar=AVATARS["user"]):
        line, tool = st.columns([12, 1])
        line.text(strip_control_chars(prompt))
        with (
            tool.popover("", icon=":material/edit:", type="tertiary", help=t["edit"], key=f"open:{key}"),
            st.form(key + ":form", border=False),
        ):
            st.text_area(t["edit"], strip_control_chars(prompt), key=key, label_visibility="collapsed")
            st.form_submit_button(t["send"], on_click=edit_prompt, args=(exchanges, number, key), type="primary")


def edit_prompt(exchanges: list[Exchange], number: int, key: str) -> None:
    text = st.session_state[key].strip()
    if text:
        exchanges[number:] = [{"prompt": text, "answers": []}]


def show_answer(t: Texts, chat_model: "ChatModel", answer: Answer, key: str) -> None:
    if "error" in answer:
        show_error(t["cannot_answer"], answer["error"])
        return
    if answer.get("reasoning"):
        with st.expander(t["reasoning"], icon=":material/psychology:"):
            st.text(strip_control_chars(answer["reasoning"]))
    show_inspection(t, chat_model, answer, key)
    if "stats" in answer:
        st.caption(stats_line(t, answer["stats"]))


def generate_answers(
    t: Texts,
    names: list[str],
    chat_models: "list[ChatModel]",
    exchanges: list[Exchange],
    settings: dict[str, Any],
    system: str,
) -> None:
    """Stream the answers to the last message, one run after the other, so that each has the machine to itself.

    Any click, including Stop, ends this run of the script. The answers are therefore in the conversation from the
    start, and a partial answer is kept.
    """
    answers: list[Answer] = [{"content": ""} for _ in chat_models]
    exchanges[-1]["answers"] = answers
    screens = []
    for box in answer_boxes(names):
        with box:
            screens.append((st.empty(), st.empty()))
        screens[-1][1].text(CURSOR)
    st.button(t["stop"], icon=":material/stop_circle:")
    for number, chat_model in enumerate(chat_models):
        messages = history(exchanges[:-1], number, "" if chat_model.is_base else system)
        messages.append({"role": "user", "content": exchanges[-1]["prompt"]})
        stream_answer(t, chat_model, messages, settings, answers[number], screens[number])


def stream_answer(
    t: Texts,
    chat_model: "ChatModel",
    messages: list[dict[str, str]],
    settings: dict[str, Any],
    answer: Answer,
    screen: tuple[DeltaGenerator, DeltaGenerator],
) -> None:
    """Generate one answer, on the screen and into `answer`."""
    last_shown = 0.0
    try:
        generation = chat_model.generate(messages, **settings)
        generation.request_logprobs(N_TOP)
        try:
            for _ in generation:
                if time.monotonic() - last_shown > REFRESH_SECONDS:
                    update_answer(t, generation, answer, screen, CURSOR)
                    last_shown = time.monotonic()
        finally:  # Streamlit ends a script by an exception
            generation.cancel()
        update_answer(t, generation, answer, screen)
    except UserError as error:
        answer["error"] = str(error)


def update_answer(
    t: Texts,
    generation: "Generation",
    answer: Answer,
    screen: tuple[DeltaGenerator, DeltaGenerator],
    cursor: str = "",
) -> None:
    """Show the answer so far, then store it.

    The order matters: Streamlit ends a script that a click has overtaken when it shows something, and the next script,
    which is drawing in its own thread already, must not see the answer change.
    """
    reasoning, content = generation.split_reasoning()
    stats = generation.stats()
    ids = generation.ids
    tokens = answer.get("tokens", [])
    tokens = tokens + generation.token_details(len(tokens))
    if reasoning:
        screen[0].caption(t["thinking"] if cursor and not content else t["reasoning"])
    screen[1].text(strip_control_chars(content) + cursor)
    answer.update({"content": content, "reasoning": reasoning, "stats": stats, "tokens": tokens, "ids": ids})


def show_error(title: str, error: object) -> None:
    st.error(title, icon=":material/error:")
    st.text(strip_control_chars(str(error)))
