"""What is known of a run: its curves and its settings."""

import pandas
import streamlit as st

from web.sidebar import label

CURVES = (("loss", "val_loss"), ("bpc", "val_bpc"), ("lr",), ("grad_norm",), ("tokens_per_s",), ("mfu",))


def show_run(say, run):
    """The curves of metrics.jsonl, config.yaml and run.json of one run."""
    from engine.runs.metrics import read_metrics

    st.text(label(run))  # st.text and st.code: a folder may come from a stranger
    records = pandas.DataFrame(read_metrics(run.path / "metrics.jsonl"))
    # one point alone is no curve: it stands beside the choice of the run
    shown = [[name for name in names if name in records] for names in CURVES]
    shown = [names for names in shown if names and records[names].notna().sum().max() > 1]
    if not shown:
        st.caption(say["no_curves"])
    columns = st.columns(2) if len(shown) > 1 else [st.container()]
    for number, names in enumerate(shown):
        with columns[number % len(columns)]:
            st.caption(say[f"curve_{names[0]}"])
            curve = records[["step", *names]].copy()
            curve[names] = curve[names].apply(pandas.to_numeric, errors="coerce")
            # a step and an evaluation are two records of one step, and each has only its own figures
            curve = curve.groupby("step").last().rename(columns={name: say[f"line_{name}"] for name in names})
            st.vega_lite_chart(
                curve.reset_index().melt("step", var_name="line", value_name="value").dropna(),
                chart(say, len(names) > 1),
                height=220,
            )
    for name, language in (("config.yaml", "yaml"), ("run.json", "json")):
        path = run.path / name
        if path.is_file():
            with st.expander(name, icon=":material/description:"):
                st.code(path.read_text(encoding="utf-8", errors="replace"), language=language, height=400)


def chart(say, legend):
    """A Vega-Lite line over the steps. Its scale does not begin at 0, which would flatten the end of every curve."""
    return {
        "mark": {"type": "line", "point": {"size": 14}, "strokeWidth": 1.5},
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": say["step"], "axis": {"format": "d"}},
            "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
            "color": {
                "field": "line",
                "type": "nominal",
                "sort": None,
                "legend": {"title": None, "orient": "bottom"} if legend else None,
            },
        },
    }
