"""The training curves and the settings of a run."""

from typing import TYPE_CHECKING, Any

import pandas
import streamlit as st

from web.sidebar import run_label
from web.texts import Texts

if TYPE_CHECKING:
    from engine.runs.registry import RunInfo

CURVES = (("loss", "val_loss"), ("bpc", "val_bpc"), ("lr",), ("grad_norm",), ("tokens_per_s",), ("mfu",))


def show_training(t: Texts, run: "RunInfo") -> None:
    """The curves of a run's metrics.jsonl, its config.yaml and its run.json."""
    from engine.runs.metrics import read_metrics

    st.text(run_label(run))  # st.text and st.code: the contents of a run folder are untrusted
    records = pandas.DataFrame(read_metrics(run.path / "metrics.jsonl"))
    # a single point is no curve; it is shown in the caption of the run
    curves = [[name for name in names if name in records] for names in CURVES]
    curves = [names for names in curves if names and records[names].notna().sum().max() > 1]
    if not curves:
        st.caption(t["no_curves"])
    columns = st.columns(2) if len(curves) > 1 else [st.container()]
    for number, names in enumerate(curves):
        with columns[number % len(columns)]:
            show_curve(t, records, names)
    for file, language in (("config.yaml", "yaml"), ("run.json", "json")):
        path = run.path / file
        if path.is_file():
            with st.expander(file, icon=":material/description:"):
                st.code(path.read_text(encoding="utf-8", errors="replace"), language=language, height=400)


def show_curve(t: Texts, records: pandas.DataFrame, names: list[str]) -> None:
    st.caption(t[f"curve_{names[0]}"])
    curve = records[["step", *names]].copy()
    curve[names] = curve[names].apply(pandas.to_numeric, errors="coerce")
    # a training step and its evaluation are two records of one step, with different keys
    curve = curve.groupby("step").last().rename(columns={name: t[f"line_{name}"] for name in names})
    st.vega_lite_chart(
        curve.reset_index().melt("step", var_name="line", value_name="value").dropna(),
        line_chart(t, has_legend=len(names) > 1),
        height=220,
    )


def line_chart(t: Texts, has_legend: bool) -> dict[str, Any]:
    """A Vega-Lite line over the steps. Its scale does not begin at 0, which would flatten the end of every curve."""
    return {
        "mark": {"type": "line", "point": {"size": 14}, "strokeWidth": 1.5},
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": t["step"], "axis": {"format": "d"}},
            "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
            "color": {
                "field": "line",
                "type": "nominal",
                "sort": None,
                "legend": {"title": None, "orient": "bottom"} if has_legend else None,
            },
        },
    }
