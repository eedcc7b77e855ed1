"""Chat with the trained runs in a browser: streamlit run run_model.py

Settings go after two dashes: streamlit run run_model.py -- --output_path=output
Texts of users, models and run folders are shown by st.text and the like, which read no Markdown and no HTML.
"""

from typing import TYPE_CHECKING

import streamlit as st

import utils.openmp  # noqa: F401  before PyTorch is loaded
from engine.inference.options import ChatOptions
from utils.config import help_text, parse
from utils.errors import UserError
from web.chat_view import show_chat, show_error
from web.sidebar import check_integers, choose_language, choose_runs, run_label, show_settings
from web.texts import Texts
from web.training_view import show_training

if TYPE_CHECKING:  # torch comes with it, and takes seconds
    from engine.inference.chat import ChatModel
    from engine.runs.registry import RunInfo


def main() -> None:
    with st.sidebar:
        t = choose_language()
    # Without page_icon, which the browser would fetch from another host. The menu offers the light and dark themes.
    st.set_page_config(page_title="Mini-LLM", initial_sidebar_state=340, menu_items={"About": t["about"]})
    try:
        options = parse(ChatOptions)
        check_integers(options)
        show_page(t, options)
    except UserError as error:
        show_error(t["cannot_show"], error)
    except SystemExit:  # --help and --version: the page shows the help, the terminal has both
        st.code(help_text(ChatOptions), language=None)


def show_page(t: Texts, options: ChatOptions) -> None:
    with st.sidebar:
        runs = choose_runs(t, options.output_path)
    view = st.segmented_control(
        t["view"],
        ["chat", "training"],
        default="chat",
        format_func=t.__getitem__,
        key="view",
        label_visibility="collapsed",
    )
    if view == "training":
        for run in runs:
            show_training(t, run)
        return
    with st.sidebar:
        chat_models = [load(t, run, options) for run in runs]
        settings, system = show_settings(t, options, chat_models)
    show_chat(t, [run_label(run) for run in runs], chat_models, settings, system)


def load(t: Texts, run: "RunInfo", options: ChatOptions) -> "ChatModel":
    """The run's ChatModel, loaded once for all browser sessions; conversations are kept in the sessions."""
    try:
        with st.spinner(t["loading"]):
            return load_cached(str(run.path), run.modified, options.device, options.precision)
    except ValueError as error:  # UserError, or an architecture that refuses its arguments
        show_error(t["cannot_load"], error)
        st.stop()


@st.cache_resource(max_entries=3, show_spinner=False)
def load_cached(path: str, modified: float, device: str, precision: str) -> "ChatModel":
    """`modified` is in the key: a run that has trained further is loaded again. Two browsers are answered at once."""
    from engine.inference.chat import open_chat_model

    return open_chat_model(path, device, precision, "auto", slots=2)


main()
