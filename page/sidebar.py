"""The side of the page: the language, one or two of the runs in the output folder, and how they shall answer."""
import streamlit as st

from utils.log import format_count
from utils.page_texts import TEXTS
from utils.talk_options import SAMPLING
from utils.terminal import harmless


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
        from engine.chat import talkers  # torch comes with it: seconds, the first time
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
    st.caption(" · ".join(facts))               # numbers and our own words only: st.caption reads Markdown
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
    return harmless(" · ".join(map(str, parts)))


def controls(say, options, speakers):
    """The sampling settings and the system prompt: (dict, str)."""
    system = ""
    if not all(speaker.is_base for speaker in speakers):
        system = st.text_area(say["system"], placeholder=say["system_hint"], key="system", height=68)
    longest = min(speaker.model.args.max_seq_len for speaker in speakers)
    settings = {
        "temperature": st.slider(say["temperature"], 0.0, 2.0, options.temperature, 0.05, help=say["temperature_help"]),
        "top_p": st.slider(say["top_p"], 0.05, 1.0, options.top_p, 0.05, help=say["top_p_help"]),
        "max_new_tokens": st.slider(say["max_new_tokens"], 1, longest, min(options.max_new_tokens, longest)),
    }
    with st.expander(say["more"]):
        settings["top_k"] = st.number_input(say["top_k"], 0, None, options.top_k, help=say["top_k_help"])
        for name, low, high, step in (("min_p", 0.0, 1.0, 0.01), ("repetition_penalty", 1.0, 2.0, 0.05),
                                      ("frequency_penalty", -2.0, 2.0, 0.1), ("presence_penalty", -2.0, 2.0, 0.1)):
            settings[name] = st.slider(say[name], low, high, float(getattr(options, name)), step,
                                       help=say[f"{name}_help"])
        settings["seed"] = st.number_input(say["seed"], 0, None, options.seed, placeholder=say["seed_hint"],
                                           help=say["seed_help"])
    assert {*settings} == {"max_new_tokens", *SAMPLING}
    return settings, system.strip()
