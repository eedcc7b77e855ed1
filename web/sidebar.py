"""The sidebar: the language, one or two runs of the output folder, and the sampling settings."""

from typing import TYPE_CHECKING, Any

import streamlit as st

from engine.inference.options import SAMPLING, ChatOptions
from utils.errors import UserError
from utils.log import format_count
from utils.terminal import strip_control_chars
from web.texts import TEXTS, Texts

if TYPE_CHECKING:
    from engine.inference.chat import ChatModel
    from engine.runs.registry import RunInfo

MAX_INT = 2**53 - 1  # the largest integer that every browser represents exactly
SLIDERS = {  # name: from, to, step
    "temperature": (0.0, 2.0, 0.05),
    "top_p": (0.05, 1.0, 0.05),
    "min_p": (0.0, 1.0, 0.01),
    "repetition_penalty": (1.0, 2.0, 0.05),
    "frequency_penalty": (-2.0, 2.0, 0.1),
    "presence_penalty": (-2.0, 2.0, 0.1),
}
ALWAYS_SHOWN = ("temperature", "top_p")  # the other settings are folded


def choose_language() -> Texts:
    """The texts of the chosen language; the default is the browser's."""
    title, choice = st.columns([3, 2], vertical_alignment="center")
    title.markdown("### Mini-LLM")
    default = "中文" if (st.context.locale or "").startswith("zh") else "English"
    language = choice.selectbox("Language", list(TEXTS), list(TEXTS).index(default), label_visibility="collapsed")
    return TEXTS[language]


def choose_runs(t: Texts, output_path: str) -> "list[RunInfo]":
    """One or two runs of the output folder; without any, the page shows how to make one and ends."""
    with st.spinner(t["loading"]):
        from engine.inference.chat import chat_runs  # imports torch: seconds, the first time

        runs = {str(run.path): run for run in chat_runs(output_path)}
    if not runs:
        st.warning(t["no_runs"])
        st.markdown(t["no_runs_hint"])
        st.text(output_path)
        st.stop()
    chosen = [select_run(t, t["run"], runs, "run")]
    if len(runs) > 1 and st.toggle(t["compare"], help=t["compare_help"], key="compare"):
        others = {path: run for path, run in runs.items() if run is not chosen[0]}
        chosen.append(select_run(t, t["other_run"], others, "other_run"))
    return chosen


def select_run(t: Texts, title: str, runs: "dict[str, RunInfo]", key: str) -> "RunInfo":
    run = runs[st.selectbox(title, list(runs), format_func=lambda path: run_label(runs[path]), key=key)]
    facts = []
    if run.step is not None:
        facts.append(f"{t['step']} {run.step:,}")
    if run.val_loss is not None:
        facts.append(f"{t['val_loss']} {run.val_loss:.3f}")
    if run.val_bpc is not None:
        facts.append(f"{run.val_bpc:.2f} {t['val_bpc']}")
    st.caption(" · ".join(facts))  # numbers and our own texts only: st.caption reads Markdown
    return run


def run_label(run: "RunInfo") -> str:
    """Model, stage, size and validation loss of a run, and its folder if that has a name of its own."""
    parts = [run.model_name, run.stage]
    if run.params is not None:
        parts.append(format_count(run.params))
    if run.val_loss is not None:
        parts.append(f"{run.val_loss:.3f}")
    if run.path.name != f"{run.stage}_{run.model_name}":
        parts.append(run.path.name)
    return strip_control_chars(" · ".join(map(str, parts)))


def show_settings(t: Texts, options: ChatOptions, chat_models: "list[ChatModel]") -> tuple[dict[str, Any], str]:
    """The controls of generation: (arguments of `ChatModel.generate`, system prompt)."""
    longest = min(chat_model.model.args.max_seq_len for chat_model in chat_models)
    restore_values(options, longest)
    system = ""
    if not all(chat_model.is_base for chat_model in chat_models):
        system = st.text_area(t["system"], placeholder=t["system_hint"], height=68, **persistent("system"))
    settings: dict[str, Any] = {name: slider(t, options, name) for name in ALWAYS_SHOWN}
    settings["max_new_tokens"] = st.slider(t["max_new_tokens"], 1, longest, **persistent("max_new_tokens"))
    with st.expander(t["more"]):
        settings["top_k"] = integer(t, "top_k")
        settings |= {name: slider(t, options, name) for name in SLIDERS if name not in ALWAYS_SHOWN}
        settings["seed"] = integer(t, "seed", value=None, placeholder=t["seed_hint"])
    assert {*settings} == {"max_new_tokens", *SAMPLING}
    return settings, system.strip()


def restore_values(options: ChatOptions, longest: int) -> None:
    """Give the controls the values that the user chose, or at first those of the command line.

    Streamlit forgets the value of a control that a run of the script did not draw. Values that have not changed are not
    set: setting one overrides what the user is choosing at that moment.
    """
    state = st.session_state
    defaults = {"system": "", "max_new_tokens": options.max_new_tokens, **options.sampling()}
    chosen = state.setdefault("chosen", defaults)
    for name, value in chosen.items():
        if name not in state:
            state[name] = value
    max_new_tokens = min(chosen["max_new_tokens"], longest)
    if state.max_new_tokens != max_new_tokens:
        state.max_new_tokens = max_new_tokens


def persistent(name: str) -> dict[str, Any]:
    """The arguments of a control whose value survives a change of language, view or run."""

    def remember() -> None:
        st.session_state.chosen[name] = st.session_state[name]

    return {"key": name, "on_change": remember}


def slider(t: Texts, options: ChatOptions, name: str) -> float:
    low, high, step = SLIDERS[name]
    value = float(getattr(options, name))  # the command line may go beyond what the slider offers
    return st.slider(t[name], min(low, value), max(high, value), step=step, help=t[f"{name}_help"], **persistent(name))


def integer(t: Texts, name: str, **more: Any) -> int | None:
    return st.number_input(t[name], 0, MAX_INT, help=t[f"{name}_help"], **persistent(name), **more)


def check_integers(options: ChatOptions) -> None:
    """UserError when an integer of the command line is too large for a browser."""
    for name in ("top_k", "seed"):
        value = getattr(options, name)
        if value is not None and value > MAX_INT:
            raise UserError(f"--{name}={value} is more than a browser counts to: give at most {MAX_INT}")
