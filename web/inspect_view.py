"""An answer as text, as token probabilities with alternatives, or as expert load."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas
import streamlit as st

from utils.terminal import strip_control_chars
from web.exchange import Answer
from web.texts import Texts

if TYPE_CHECKING:
    from engine.inference.chat import ChatModel

N_TOP = 8  # alternatives shown per token
HERE = Path(__file__).parent
# Our own component. It gets the texts as data and writes them by textContent, which reads no markup.
show_tokens = st.components.v2.component(
    "mini_llm_tokens",
    js=(HERE / "tokens.js").read_text(encoding="utf-8"),
    css=(HERE / "tokens.css").read_text(encoding="utf-8"),
)


def show_inspection(t: Texts, chat_model: "ChatModel", answer: Answer, key: str) -> None:
    """The answer in the view that is chosen below it."""
    views = ["text"]
    if answer.get("tokens"):
        views.append("probabilities")
        if chat_model.reports_expert_load:
            views.append("experts")
    container = st.container()
    view = "text"
    if len(views) > 1:
        view = (
            st.segmented_control(
                t["view"],
                views,
                default="text",
                format_func=t.__getitem__,
                key=f"view:{key}",
                label_visibility="collapsed",
            )
            or "text"
        )
    with container:
        if view == "probabilities":
            show_probabilities(t, answer, key)
        elif view == "experts":
            show_experts(t, chat_model, answer, key)
        else:
            st.text(strip_control_chars(answer["content"]))


def show_probabilities(t: Texts, answer: Answer, key: str) -> None:
    """Tokens coloured by their probability; the alternatives appear when one is hovered or clicked."""
    st.caption(t["probabilities_help"])
    tokens = [
        {
            **token,
            "text": strip_control_chars(token["text"]),
            "top": [[strip_control_chars(text), probability] for text, probability in token["top"]],
        }
        for token in answer["tokens"]
    ]
    show_tokens(key=f"tokens:{key}", data={"tokens": tokens})


def show_experts(t: Texts, chat_model: "ChatModel", answer: Answer, key: str) -> None:
    """Two tables: the share of tokens per expert, and the experts of each token."""
    from engine.inference.inspect import expert_loads

    if "loads" not in answer:
        with st.spinner(t["computing_load"]):
            n_prompt = len(answer["ids"]) - len(answer["tokens"])
            answer["loads"] = expert_loads(chat_model.model, answer["ids"], n_prompt)
    loads = answer["loads"]
    name = next(iter(loads)) if len(loads) == 1 else st.selectbox(t["load"], list(loads), key=f"load:{key}")
    load = loads[name]  # (T, L, E)
    layers = [f"{t['layer']} {number + 1}" for number in range(load.shape[1])]
    st.caption(t["experts_help"])
    share = load.sum(0) / load.sum((0, 2))[:, None].clamp(min=1)  # (L, E)
    experts = [str(expert) for expert in range(load.shape[2])]
    st.dataframe(
        pandas.DataFrame(share.numpy(), layers, experts)
        .style.format("{:.0%}")
        .map(lambda part: f"background-color: rgba(76, 148, 144, {part:.2f})"),
        row_height=28,
    )
    if len(load) == len(answer["tokens"]):
        chosen = [[" ".join(map(str, layer.nonzero().flatten().tolist())) for layer in token] for token in load]
        table = pandas.DataFrame(chosen, columns=layers)
        table.insert(0, t["token"], [strip_control_chars(token["text"]) for token in answer["tokens"]])
        st.dataframe(table, hide_index=True, height=300, row_height=28)
