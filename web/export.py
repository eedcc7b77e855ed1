"""A conversation to take away: as the fine-tuning data has them, or to read."""

import json

import streamlit as st

from utils.terminal import strip_control_chars


def export(say, names, exchanges, system):
    """The button that offers both files."""
    with st.popover(say["export"], icon=":material/download:", type="tertiary"):
        st.download_button(
            "JSON Lines",
            as_jsonl(names, exchanges, system),
            "conversation.jsonl",
            "application/jsonl",
            on_click="ignore",
        )
        st.download_button(
            "Markdown", as_markdown(names, exchanges, system), "conversation.md", "text/markdown", on_click="ignore"
        )


def as_jsonl(names, exchanges, system):
    """A line for each of the runs: {"messages": [...]}, without what was not answered."""
    lines = []
    for number in range(len(names)):
        messages = [{"role": "system", "content": system}] if system else []
        for exchange in exchanges:
            answer = exchange["answers"][number]
            if answer.get("content") and "error" not in answer:
                messages += [
                    {"role": "user", "content": exchange["ask"]},
                    {"role": "assistant", "content": answer["content"]},
                ]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines)


def as_markdown(names, exchanges, system):
    """The conversation under headings; the texts are indented, so that nothing in them is taken for Markdown."""

    def block(text):
        return "".join(f"    {line}\n" for line in strip_control_chars(text).splitlines()) + "\n"

    parts = ["# Mini-LLM\n\n", f"## system\n\n{block(system)}" if system else ""]
    for exchange in exchanges:
        parts.append(f"## user\n\n{block(exchange['ask'])}")
        for name, answer in zip(names, exchange["answers"]):
            title = f"## assistant\n\n{block(name)}" if len(names) > 1 else "## assistant\n\n"
            parts.append(title + block(answer.get("error", answer.get("content", ""))))
    return "".join(parts)
