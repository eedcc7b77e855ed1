"""Talk to the trained runs in a browser: streamlit run run_model.py

Settings go after two dashes: streamlit run run_model.py -- --output_path=output
All text that a model or a person wrote is shown by st.text and the like, which read no Markdown and no HTML.
"""

import streamlit as st

from engine.inference.options import TalkOptions
from utils.config import help_text, parse
from utils.errors import UserError
from web.chat_view import show_error, talk
from web.sidebar import choose_language, choose_runs, controls, label
from web.training_view import show_run


def main():
    with st.sidebar:
        say = choose_language()
    # No page_icon: the browser would fetch it from another host. With a menu comes the choice of light and dark.
    st.set_page_config(page_title="Mini-LLM", initial_sidebar_state=340, menu_items={"About": say["about"]})
    try:
        options = parse(TalkOptions)
        with st.sidebar:
            runs = choose_runs(say, options.output_path)
        view = st.segmented_control(
            say["view"],
            ["talk", "record"],
            default="talk",
            format_func=say.get,
            key="view",
            label_visibility="collapsed",
        )
        if view == "record":
            for run in runs:
                show_run(say, run)
            return
        with st.sidebar:
            speakers = [load(say, run, options) for run in runs]
            settings, system = controls(say, options, speakers)
    except UserError as error:
        show_error(say["cannot_show"], error)
        return
    except SystemExit:  # --help, which the terminal shows; here the page would wait for ever
        st.code(help_text(TalkOptions), language=None)
        return
    talk(say, [label(run) for run in runs], speakers, settings, system)


def load(say, run, options):
    """The run's `Speaker`, loaded once for all browser sessions: nothing of a conversation is kept on it."""
    try:
        with st.spinner(say["loading"]):
            return load_cached(str(run.path), run.modified, options.device, options.precision)
    except ValueError as error:
        show_error(say["cannot_load"], error)
        st.stop()


@st.cache_resource(max_entries=3, show_spinner=False)
def load_cached(path, modified, device, precision):
    """`modified` is part of the key: a run that was trained on is loaded again."""
    from engine.inference.chat import open_speaker
    from engine.inference.inspect import reports_load

    speaker = open_speaker(path, device, precision)
    speaker.has_experts = reports_load(speaker.model)
    return speaker


main()
