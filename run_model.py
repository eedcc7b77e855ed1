"""Talk to the trained runs in a browser: streamlit run run_model.py

Settings go after two dashes: streamlit run run_model.py -- --output_path=output
All text that a model or a person wrote is shown by st.text, which reads no Markdown and no HTML.
"""
import time

import streamlit as st

from utils.config import parse
from utils.errors import UserError
from utils.log import format_count
from utils.page_texts import TEXTS
from utils.talk_options import TalkOptions
from utils.terminal import harmless

REFRESH = 0.05      # s between two updates of a streaming answer: the eye needs no more, the browser likes less
AVATARS = {"user": ":material/person:", "assistant": ":material/auto_awesome:"}


def main():
    # No page_icon: the browser would fetch it from another host.
    st.set_page_config(page_title="Mini-LLM", initial_sidebar_state=340)
    try:
        options = parse(TalkOptions)
    except UserError as error:
        show_error("Settings", error)
        st.stop()
    with st.sidebar:
        say = choose_language()
        run = choose_run(say, options.output_path)
        speaker = load(say, run, options)
        settings, system = controls(say, options, speaker)
    talk(say, str(run.path), speaker, settings, system)


def choose_language():
    """The texts of the chosen language; at first the browser's."""
    title, choice = st.columns([3, 2], vertical_alignment="center")
    title.markdown("### Mini-LLM")
    first = "中文" if (st.context.locale or "").startswith("zh") else "English"
    language = choice.selectbox("Language", list(TEXTS), list(TEXTS).index(first), label_visibility="collapsed")
    return TEXTS[language]


def choose_run(say, output_path):
    """One of the runs in the output folder; without any, the page says how to make one and ends."""
    with st.spinner(say["loading"]):
        from engine.chat import talkers  # torch comes with it: seconds, the first time
        runs = {str(run.path): run for run in talkers(output_path)}
    if not runs:
        st.warning(say["no_runs"])
        st.markdown(say["no_runs_hint"])
        st.text(output_path)
        st.stop()
    run = runs[st.selectbox(say["run"], list(runs), format_func=lambda path: label(runs[path]), key="run")]
    facts = []
    if run.step is not None:
        facts.append(f"{say['step']} {run.step}")
    if run.val_loss is not None:
        facts.append(f"{say['held_out']} {run.val_loss:.3f}")
    if run.val_bpc is not None:
        facts.append(f"{run.val_bpc:.2f} {say['bits']}")
    st.caption(" · ".join(facts))               # numbers and our own words only: st.caption reads Markdown
    return run


def label(run):
    parts = [run.model_name, run.stage]
    if run.params is not None:
        parts.append(format_count(run.params))
    if run.val_loss is not None:
        parts.append(f"{run.val_loss:.3f}")
    if run.path.name != f"{run.stage}_{run.model_name}":
        parts.append(run.path.name)
    return " · ".join(parts)


def load(say, run, options):
    """The run's `Speaker`, loaded once for all browser sessions: nothing of a conversation is kept on it."""
    try:
        with st.spinner(say["loading"]):
            return load_cached(str(run.path), run.modified, options.device, options.precision)
    except ValueError as error:
        show_error(say["cannot_load"], error)
        st.stop()


@st.cache_resource(max_entries=2, show_spinner=False)
def load_cached(path, modified, device, precision):
    """`modified` is part of the key: a run that was trained on is loaded again."""
    from engine.chat import open_speaker
    return open_speaker(path, device, precision)


def controls(say, options, speaker):
    """The sampling settings and the system prompt of the sidebar."""
    system = ""
    if not speaker.is_base:
        system = st.text_area(say["system"], placeholder=say["system_hint"], key="system", height=68)
    longest = speaker.model.args.max_seq_len
    settings = {
        "temperature": st.slider(say["temperature"], 0.0, 2.0, options.temperature, 0.05, help=say["temperature_help"]),
        "top_p": st.slider(say["top_p"], 0.05, 1.0, options.top_p, 0.05, help=say["top_p_help"]),
        "max_new_tokens": st.slider(say["max_new_tokens"], 1, longest, min(options.max_new_tokens, longest)),
    }
    with st.expander(say["more"]):
        settings |= {
            "top_k": st.number_input(say["top_k"], 0, None, options.top_k, help=say["top_k_help"]),
            "min_p": st.slider(say["min_p"], 0.0, 1.0, options.min_p, 0.01, help=say["min_p_help"]),
            "repetition_penalty": st.slider(say["repetition_penalty"], 1.0, 2.0, options.repetition_penalty, 0.05,
                                            help=say["repetition_penalty_help"]),
            "seed": st.number_input(say["seed"], 0, None, options.seed, placeholder=say["seed_hint"],
                                    help=say["seed_help"]),
        }
    return settings, system.strip()


def talk(say, run, speaker, settings, system):
    """The conversation with one run: st.session_state holds one a run, and belongs to this browser session alone."""
    turns = st.session_state.setdefault("talks", {}).setdefault(run, [])
    text = st.chat_input(say["begin" if speaker.is_base else "ask"])
    if text:
        turns.append({"role": "user", "content": text})
    if not turns:
        st.subheader(say["base_title" if speaker.is_base else "chat_title"])
        st.caption(say["base_welcome" if speaker.is_base else "chat_welcome"])
        return
    for turn in turns:
        show(say, turn)
    if turns[-1]["role"] == "user":
        answer(say, speaker, turns, settings, system)
        st.rerun()                      # draws the finished answer with its figures and buttons
    again, clear, _ = st.columns([1, 1, 2])
    again.button(say["regenerate"], icon=":material/refresh:", on_click=turns.pop, type="tertiary")
    clear.button(say["clear"], icon=":material/edit_square:", on_click=turns.clear, type="tertiary")


def show(say, turn):
    with st.chat_message(turn["role"], avatar=AVATARS[turn["role"]]):
        if "error" in turn:
            show_error(say["cannot"], turn["error"])
            return
        st.text(harmless(turn["content"]))
        if "figures" in turn:
            st.caption(describe(say, turn["figures"]))


def answer(say, speaker, turns, settings, system):
    """Stream an answer to the last turn. Any click, Stop among them, ends this run of the script: so the turn is in
    the conversation from the start, and what has been written so far is never lost.
    """
    history = [{"role": turn["role"], "content": turn["content"]} for turn in answered(turns)]
    if system:
        history.insert(0, {"role": "system", "content": system})
    turn = {"role": "assistant", "content": ""}
    turns.append(turn)
    with st.chat_message("assistant", avatar=AVATARS["assistant"]):
        place = st.empty()
        place.text("▍")
        st.button(say["stop"], icon=":material/stop_circle:")
        shown = 0.0
        try:
            reply = speaker.answer(history, **settings)
            for _ in reply:
                if time.monotonic() - shown > REFRESH:
                    keep(reply, turn, place, "▍")
                    shown = time.monotonic()
            keep(reply, turn, place)
        except ValueError as error:
            if not getattr(error, "user_error", False):
                raise
            turn["error"] = str(error)


def keep(reply, turn, place, cursor=""):
    """Show what there is of an answer, then remember it, in this order: showing is where Streamlit ends a script that
    has been overtaken by a click, and the next one, already drawing in its own thread, must not see the turn change.
    """
    text, figures = reply.text, reply.figures()
    place.text(harmless(text) + cursor)
    turn["content"], turn["figures"] = text, figures


def answered(turns):
    """The turns without those that ended in an error, and the messages that led to it."""
    kept = []
    for turn in turns:
        if "error" in turn:
            kept.pop()
        else:
            kept.append(turn)
    return kept


def describe(say, figures):
    """The line below an answer: numbers and our own words only, as st.caption reads Markdown."""
    parts = [f"{figures['tokens']} {say['tokens']}", f"{figures['tokens_per_s']:.1f} {say['tokens_per_s']}",
             f"{say['first']} {1000 * figures['first_seconds']:.0f} ms"]
    if figures["finish"] != "stop":
        parts.append(say[figures["finish"]])
    if figures["dropped"]:
        parts.append(say["dropped"])
    return " · ".join(parts)


def show_error(title, error):
    st.error(title, icon=":material/error:")
    st.text(harmless(str(error)))


main()
