"""The conversation: a list of exchanges, each a dict of `ask` and `answers`, one answer for each run that was asked.

An answer is a dict: content and thought (texts), figures, tokens (with what else could have come), ids; or an error.
st.session_state holds a conversation for each choice of runs, and belongs to one browser session alone.
"""

import time
import zlib

import streamlit as st

from utils.terminal import strip_control_chars
from web.export import export
from web.inspect_view import LIKELIEST, look_inside

REFRESH = 0.05  # s between two updates of a streaming answer: the eye needs no more, the browser likes less
AVATARS = {"user": ":material/person:", "assistant": ":material/auto_awesome:"}


def talk(say, names, speakers, settings, system):
    """Draw the conversation with these runs, called `names`, and answer what is new in it."""
    exchanges = st.session_state.setdefault("talks", {}).setdefault(tuple(names), [])
    base = all(speaker.is_base for speaker in speakers)
    text = st.chat_input(say["begin" if base else "ask"])
    if text:
        exchanges.append({"ask": text, "answers": []})
    if not exchanges:
        st.subheader(say["base_title" if base else "chat_title"])
        st.caption(say["base_welcome" if base else "chat_welcome"])
        return
    for number, exchange in enumerate(exchanges):
        show_ask(say, exchanges, number)
        if exchange["answers"]:
            for speaker, answer, place in zip(speakers, exchange["answers"], places(names), strict=True):
                with place:
                    show_answer(say, speaker, answer, f"{number}:{len(names)}:{names[speakers.index(speaker)]}")
    if not exchanges[-1]["answers"]:
        write(say, names, speakers, exchanges, settings, system)
        st.rerun()  # draws the finished answers with their figures and buttons
    again, clear, save, _ = st.columns([2, 2, 2, 3], vertical_alignment="center")
    again.button(say["regenerate"], icon=":material/refresh:", on_click=forget, args=(exchanges,), type="tertiary")
    clear.button(say["clear"], icon=":material/edit_square:", on_click=exchanges.clear, type="tertiary")
    with save:
        export(say, names, exchanges, system)


def forget(exchanges):
    """Take back the last answers, so that they are written again."""
    exchanges[-1]["answers"] = []


def places(names):
    """Where the answers go: the whole width for one, side by side and under their names for two."""
    columns = st.columns(len(names)) if len(names) > 1 else [st.container()]
    for name, column in zip(names, columns):
        box = column.chat_message("assistant", avatar=AVATARS["assistant"])
        if len(names) > 1:
            box.text(name)  # st.text: a folder's name is not ours
        yield box


def show_ask(say, exchanges, number):
    """A message of the person, which can be edited: all that came after it is then said anew."""
    key = f"edit:{number}:{zlib.crc32(exchanges[number]['ask'].encode())}"  # another message is another box, closed
    with st.chat_message("user", avatar=AVATARS["user"]):
        line, tool = st.columns([12, 1])
        line.text(strip_control_chars(exchanges[number]["ask"]))
        with (
            tool.popover("", icon=":material/edit:", type="tertiary", help=say["edit"], key=f"open:{key}"),
            st.form(key + ":form", border=False),
        ):
            st.text_area(
                say["edit"], strip_control_chars(exchanges[number]["ask"]), key=key, label_visibility="collapsed"
            )
            st.form_submit_button(say["send"], on_click=change, args=(exchanges, number, key), type="primary")


def change(exchanges, number, key):
    text = st.session_state[key].strip()
    if text:
        exchanges[number:] = [{"ask": text, "answers": []}]


def show_answer(say, speaker, answer, key):
    if "error" in answer:
        show_error(say["cannot"], answer["error"])
        return
    if answer.get("thought"):
        with st.expander(say["thought"], icon=":material/psychology:"):
            st.text(strip_control_chars(answer["thought"]))
    look_inside(say, speaker, answer, key)
    if "figures" in answer:
        st.caption(describe(say, answer["figures"]))


def write(say, names, speakers, exchanges, settings, system):
    """Stream the answers to the last message, one run after the other, so that each has the machine to itself.

    Any click, Stop among them, ends this run of the script: so the answers are in the conversation from the start, and
    what has been written so far is never lost.
    """
    answers = [{"content": ""} for _ in speakers]
    exchanges[-1]["answers"] = answers
    screens = []
    for box in places(names):
        with box:
            screens.append((st.empty(), st.empty()))
        screens[-1][1].text("▍")
    st.button(say["stop"], icon=":material/stop_circle:")
    for number, speaker in enumerate(speakers):
        history = [{"role": "system", "content": system}] if system and not speaker.is_base else []
        for exchange in exchanges[:-1]:
            answer = exchange["answers"][number]
            if answer.get("content") and "error" not in answer:
                history += [
                    {"role": "user", "content": exchange["ask"]},
                    {"role": "assistant", "content": answer["content"]},
                ]
        stream(
            say,
            speaker,
            [*history, {"role": "user", "content": exchanges[-1]["ask"]}],
            settings,
            answers[number],
            screens[number],
        )


def stream(say, speaker, messages, settings, answer, screen):
    """Write one answer, on the screen and into the dict `answer`."""
    shown = 0.0
    try:
        reply = speaker.answer(messages, **settings)
        reply.watch(LIKELIEST)
        for _ in reply:
            if time.monotonic() - shown > REFRESH:
                keep(say, reply, answer, screen, "▍")
                shown = time.monotonic()
        keep(say, reply, answer, screen)
    except ValueError as error:
        if not getattr(error, "user_error", False):
            raise
        answer["error"] = str(error)


def keep(say, reply, answer, screen, cursor=""):
    """Show what there is of an answer, then remember it, in this order: showing is where Streamlit ends a script that
    has been overtaken by a click, and the next one, already drawing in its own thread, must not see the answer change.
    """
    (thought, said), figures = reply.parts(), reply.figures()
    tokens, ids = answer.get("tokens", []), reply.ids
    tokens = tokens + reply.spelled(len(tokens))
    if thought:
        screen[0].caption(say["thinking"] if cursor and not said else say["thought"])
    screen[1].text(strip_control_chars(said) + cursor)
    answer.update(content=said, thought=thought, figures=figures, tokens=tokens, ids=ids)


def describe(say, figures):
    """The line below an answer: numbers and our own words only, as st.caption reads Markdown."""
    parts = [
        f"{figures['tokens']} {say['tokens']}",
        f"{figures['tokens_per_s']:.1f} {say['tokens_per_s']}",
        f"{say['first']} {1000 * figures['first_seconds']:.0f} ms",
    ]
    if figures["finish"] != "stop":
        parts.append(say[figures["finish"]])
    if figures["dropped"]:
        parts.append(say["dropped"])
    return " · ".join(parts)


def show_error(title, error):
    st.error(title, icon=":material/error:")
    st.text(strip_control_chars(str(error)))
