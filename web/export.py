"""Export of a conversation: as fine-tuning data (JSON Lines), or to read (Markdown)."""

import json

import streamlit as st

from utils.terminal import strip_control_chars
from web.exchange import Exchange, history
from web.texts import Texts


def show_export(t: Texts, names: list[str], exchanges: list[Exchange], system: str) -> None:
    """The button that offers both files."""
    with st.popover(t["export"], icon=":material/download:", type="tertiary"):
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


def as_jsonl(names: list[str], exchanges: list[Exchange], system: str) -> str:
    """One line per run: {"messages": [...]}, without unanswered messages."""
    lines = [{"messages": history(exchanges, number, system)} for number in range(len(names))]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def as_markdown(names: list[str], exchanges: list[Exchange], system: str) -> str:
    """The conversation under headings; all texts are indented, so that nothing in them is read as Markdown."""

    def block(text: str) -> str:
        return "".join(f"    {line}\n" for line in strip_control_chars(text).splitlines()) + "\n"

    parts = ["# Mini-LLM\n\n", f"## system\n\n{block(system)}" if system else ""]
    for exchange in exchanges:
        parts.append(f"## user\n\n{block(exchange['prompt'])}")
        for name, answer in zip(names, exchange["answers"]):
            title = f"## assistant\n\n{block(name)}" if len(names) > 1 else "## assistant\n\n"
            parts.append(title + block(answer.get("error", answer.get("content", ""))))
    return "".join(parts)
