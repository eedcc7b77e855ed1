"""An answer as text, or from inside: how likely each token was and what else could have come, and its experts."""

from pathlib import Path

import pandas
import streamlit as st

from utils.terminal import strip_control_chars

LIKELIEST = 8  # tokens shown beside the one that was chosen
HERE = Path(__file__).parent
# Our own code, told the texts as data; it writes them by textContent, which reads no markup.
show_tokens = st.components.v2.component(
    "mini_llm_tokens",
    js=(HERE / "tokens.js").read_text(encoding="utf-8"),
    css=(HERE / "tokens.css").read_text(encoding="utf-8"),
)


def look_inside(say, speaker, answer, key):
    """The answer, in the view that was chosen below it."""
    views = ["text"]
    if answer.get("tokens"):
        views.append("probabilities")
        if speaker.has_experts:
            views.append("experts")
    place = st.container()
    view = "text"
    if len(views) > 1:
        view = (
            st.segmented_control(
                say["view"], views, default="text", format_func=say.get, key=f"view:{key}", label_visibility="collapsed"
            )
            or "text"
        )
    with place:
        if view == "probabilities":
            st.caption(say["probabilities_help"])
            shown = [
                {
                    **token,
                    "text": strip_control_chars(token["text"]),
                    "top": [[strip_control_chars(t), p] for t, p in token["top"]],
                }
                for token in answer["tokens"]
            ]
            show_tokens(key=f"tokens:{key}", data={"tokens": shown})
        elif view == "experts":
            show_experts(say, speaker, answer, key)
        else:
            st.text(strip_control_chars(answer["content"]))


def show_experts(say, speaker, answer, key):
    """Which experts of each layer took which token, and how the tokens spread over the experts."""
    from engine.inference.inspect import expert_loads

    if "loads" not in answer:
        with st.spinner(say["reading"]):
            answer["loads"] = expert_loads(speaker.model, answer["ids"], len(answer["ids"]) - len(answer["tokens"]))
    loads = answer["loads"]
    name = next(iter(loads)) if len(loads) == 1 else st.selectbox(say["kind"], list(loads), key=f"kind:{key}")
    load = loads[name]  # (T, L, E)
    layers = [f"{say['layer']} {number + 1}" for number in range(load.shape[1])]
    st.caption(say["experts_help"])
    share = load.sum(0) / load.sum((0, 2))[:, None].clamp(min=1)  # (L, E)
    st.dataframe(
        pandas.DataFrame(share.numpy(), layers, [str(e) for e in range(load.shape[2])])
        .style.format("{:.0%}")
        .map(lambda part: f"background-color: rgba(76, 148, 144, {part:.2f})"),
        row_height=28,
    )
    if len(load) == len(answer["tokens"]):
        chosen = [[" ".join(map(str, row.nonzero().flatten().tolist())) for row in token] for token in load]
        table = pandas.DataFrame(chosen, columns=layers)
        table.insert(0, say["token"], [strip_control_chars(token["text"]) for token in answer["tokens"]])
        st.dataframe(table, hide_index=True, height=300, row_height=28)
