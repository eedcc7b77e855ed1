"""The side of the page: the language, one or two of the runs in the output folder, and how they shall answer."""

import streamlit as st

from engine.inference.options import SAMPLING
from utils.errors import UserError
from utils.log import format_count
from utils.terminal import strip_control_chars
from web.texts import TEXTS

COUNTABLE = 2**53 - 1  # the largest whole number that every browser keeps exactly
SLIDERS = {  # name: from, to, step
    "temperature": (0.0, 2.0, 0.05),
    "top_p": (0.05, 1.0, 0.05),
    "min_p": (0.0, 1.0, 0.01),
    "repetition_penalty": (1.0, 2.0, 0.05),
    "frequency_penalty": (-2.0, 2.0, 0.1),
    "presence_penalty": (-2.0, 2.0, 0.1),
}


def choose_language():
    """The texts of the chosen language; at first the browser's."""
    title, choice = st.columns([3, 2], vertical_alignment="center")
    title.markdown("### Mini-LLM")
    first = "中文" if (st.context.locale or "").startswith("zh") else "English"
    language = choice.selectbox("Language", list(TEXTS), list(TEXTS).index(first), label_visibility="collapsed")
    return TEXTS[language]


def choose_runs(say, output_path):
    """One of the runs in the output folder, or two; without any, the page says how to make one and ends."""
    with st.spinner(say["loading"]):
        from engine.inference.chat import talkers  # torch comes with it: seconds, the first time

        runs = {str(run.path): run for run in talkers(output_path)}
    if not runs:
        st.warning(say["no_runs"])
        st.markdown(say["no_runs_hint"])
        st.text(output_path)
        st.stop()
    chosen = [choose_run(say, say["run"], runs, "run")]
    if len(runs) > 1 and st.toggle(say["compare"], help=say["compare_help"], key="compare"):
        others = {path: run for path, run in runs.items() if run is not chosen[0]}
        chosen.append(choose_run(say, say["other"], others, "other"))
    return chosen


def choose_run(say, title, runs, key):
    run = runs[st.selectbox(title, list(runs), format_func=lambda path: label(runs[path]), key=key)]
    facts = []
    if run.step is not None:
        facts.append(f"{say['step']} {run.step:,}")
    if run.val_loss is not None:
        facts.append(f"{say['held_out']} {run.val_loss:.3f}")
    if run.val_bpc is not None:
        facts.append(f"{run.val_bpc:.2f} {say['bits']}")
    st.caption(" · ".join(facts))  # numbers and our own words only: st.caption reads Markdown
    return run


def label(run):
    """What a run is called: model, stage, size, held-out loss, and its folder where that has a name of its own."""
    parts = [run.model_name, run.stage]
    if run.params is not None:
        parts.append(format_count(run.params))
    if run.val_loss is not None:
        parts.append(f"{run.val_loss:.3f}")
    if run.path.name != f"{run.stage}_{run.model_name}":
        parts.append(run.path.name)
    return strip_control_chars(" · ".join(map(str, parts)))


def controls(say, options, speakers):
    """The sampling settings and the system prompt: (dict, str). UserError when an option is out of its range."""
    check(options, speakers[0])
    longest = min(speaker.model.args.max_seq_len for speaker in speakers)
    state = st.session_state
    wishes = state.setdefault("wishes", {"system": "", "max_new_tokens": options.max_new_tokens, **options.sampling()})
    for name, value in wishes.items():
        if name not in state:  # the first time, and after a run that did not draw it: Streamlit then forgets it
            state[name] = value
    wanted = min(wishes["max_new_tokens"], longest)  # what the models here can do of what was wished for
    if state.max_new_tokens != wanted:  # a value that is set goes to the browser, over one being chosen there
        state.max_new_tokens = wanted
    system = ""
    if not all(speaker.is_base for speaker in speakers):
        system = st.text_area(say["system"], placeholder=say["system_hint"], height=68, **known("system"))
    settings = {name: slide(say, options, name) for name in ("temperature", "top_p")}
    settings["max_new_tokens"] = st.slider(say["max_new_tokens"], 1, longest, **known("max_new_tokens"))
    with st.expander(say["more"]):
        settings["top_k"] = count(say, "top_k")
        settings |= {name: slide(say, options, name) for name in [*SLIDERS][2:]}
        settings["seed"] = count(say, "seed", value=None, placeholder=say["seed_hint"])
    assert {*settings} == {"max_new_tokens", *SAMPLING}
    return settings, system.strip()


def known(name):
    """The arguments of a control whose value outlives it: through another language, view or model."""

    def remember():
        st.session_state.wishes[name] = st.session_state[name]

    return {"key": name, "on_change": remember}


def slide(say, options, name):
    low, high, step = SLIDERS[name]
    value = float(getattr(options, name))  # the command line may go beyond what the slider offers
    return st.slider(say[name], min(low, value), max(high, value), step=step, help=say[f"{name}_help"], **known(name))


def count(say, name, **more):
    return st.number_input(say[name], 0, COUNTABLE, help=say[f"{name}_help"], **known(name), **more)


def check(options, speaker):
    """UserError when a setting of the command line is out of its range, or more than a browser can count to."""
    speaker.check(options.max_new_tokens, **options.sampling())
    for name in ("top_k", "seed"):
        value = getattr(options, name)
        if value is not None and value > COUNTABLE:
            raise UserError(f"{name}={value} is more than a browser counts to: give at most {COUNTABLE}")
