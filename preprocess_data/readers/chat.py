"""Chat examples in the layouts people publish, as messages: a list of {"role", "content"}."""

import json
from collections.abc import Callable
from typing import Any

from preprocess_data.readers.records import InvalidRecord
from utils.text import clean_text

Turns = list[tuple[Any, Any]]  # (role, content), neither checked yet
ROLE_NAMES = {
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "answer"), "assistant"),
    "system": "system",
}


def _from_turns(record: dict, key: str) -> Turns:
    turns = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in record[key]]
    return turns if turns and turns[0][0] == "system" else [*_system(record), *turns]


def _from_pair(record: dict, question: str, answer: str, extra: str = "") -> Turns:
    turns = _system(record)
    history = record.get("history") or []
    for past in json.loads(history) if isinstance(history, str) else history:
        if isinstance(past, str):  # alternating texts instead of [question, answer] pairs
            turns.append(("user" if not turns or turns[-1][0] != "user" else "assistant", past))
        else:
            turns += [("user", past[0]), ("assistant", past[1])]
    prompt = "\n".join(text for text in (record[question], record.get(extra) or "") if text != "")
    return [*turns, ("user", prompt), ("assistant", record[answer])]


def _system(record: dict) -> Turns:
    return [("system", record[key]) for key in ("system", "system_prompt") if record.get(key)][:1]


# The first layout whose fields are all present is the record's.
LAYOUTS: list[tuple[tuple[str, ...], Callable[[dict], Turns]]] = [
    (("messages",), lambda r: _from_turns(r, "messages")),
    (("conversations",), lambda r: _from_turns(r, "conversations")),
    (("conversation",), lambda r: _from_turns(r, "conversation")),
    (("instruction", "output"), lambda r: _from_pair(r, "instruction", "output", "input")),
    (("instruction", "response"), lambda r: _from_pair(r, "instruction", "response", "context")),
    (("q", "a"), lambda r: _from_pair(r, "q", "a")),
    (("input", "output"), lambda r: _from_pair(r, "input", "output")),
    (("prompt", "response"), lambda r: _from_pair(r, "prompt", "response")),
    (("prompt", "completion"), lambda r: _from_pair(r, "prompt", "completion")),
    (("query", "response"), lambda r: _from_pair(r, "query", "response")),
    (("question", "response"), lambda r: _from_pair(r, "question", "response")),
    (("question", "answer"), lambda r: _from_pair(r, "question", "answer")),
]


def _text(content: Any) -> str:
    """The text of a turn: a string, or a list of text parts; TypeError or KeyError for anything else."""
    return clean_text("".join(part["text"] for part in content) if isinstance(content, list) else content)


def to_messages(record: Any) -> tuple[list[dict[str, str]], bool | None] | InvalidRecord:
    """A record as (messages, held out or None), or InvalidRecord when it is not a conversation with an answer."""
    if isinstance(record, InvalidRecord):
        return record
    if not isinstance(record, dict):
        return InvalidRecord("not a chat row")
    layout = next((make for keys, make in LAYOUTS if all(key in record for key in keys)), None)
    if layout is None:
        return InvalidRecord("unknown layout")
    try:
        turns = [(role.lower(), _text(content)) for role, content in layout(record)]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError):
        return InvalidRecord("missing or mistyped fields")
    if any(role not in ROLE_NAMES for role, _ in turns):
        return InvalidRecord("unknown role")
    messages = [{"role": ROLE_NAMES[role], "content": content} for role, content in turns]
    if not any(message["role"] == "assistant" for message in messages):
        return InvalidRecord("no answer in the row")
    if any(not message["content"] for message in messages if message["role"] != "system"):
        return InvalidRecord("empty turn")
    held_out = record.get("held_out")
    return messages, held_out if isinstance(held_out, bool) else None
