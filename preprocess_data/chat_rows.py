"""Chat rows in the layouts people publish, as messages: a list of {"role", "content"}."""

from collections.abc import Callable

from preprocess_data.readers import Broken
from utils.text import clean_text

ROLE_NAMES = {
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "answer"), "assistant"),
    "system": "system",
}


def _from_turns(record: dict, key: str) -> list[tuple]:
    return [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in record[key]]


def _from_pair(record: dict, question: str, answer: str, extra: str = "") -> list[tuple]:
    turns = [("system", record[key]) for key in ("system", "system_prompt") if record.get(key)]
    for past in record.get("history") or []:  # [[question, answer], ...], or texts in turn
        if isinstance(past, str):
            turns.append(("user" if not turns or turns[-1][0] != "user" else "assistant", past))
        else:
            turns += [("user", past[0]), ("assistant", past[1])]
    asked = record[question] + (f"\n{record[extra]}" if extra and record.get(extra) else "")
    return [*turns, ("user", asked), ("assistant", record[answer])]


# The first layout whose fields are all there is the row's.
LAYOUTS: list[tuple[tuple[str, ...], Callable[[dict], list[tuple]]]] = [
    (("messages",), lambda r: _from_turns(r, "messages")),
    (("conversations",), lambda r: _from_turns(r, "conversations")),
    (("conversation",), lambda r: _from_turns(r, "conversation")),
    (
        ("instruction", "output"),
        lambda r: (
            _from_pair(r, "instruction", "output", "input") if r["instruction"] else _from_pair(r, "input", "output")
        ),
    ),
    (("q", "a"), lambda r: _from_pair(r, "q", "a")),
    (("input", "output"), lambda r: _from_pair(r, "input", "output")),
    (("prompt", "response"), lambda r: _from_pair(r, "prompt", "response")),
    (("question", "answer"), lambda r: _from_pair(r, "question", "answer")),
]


def to_messages(record) -> tuple[list[dict], bool | None] | Broken:
    """A record as (messages, held out or None), or Broken when it holds no conversation that can be learned from."""
    if isinstance(record, Broken):
        return record
    if not isinstance(record, dict):
        return Broken("not a chat row")
    layout = next((make for keys, make in LAYOUTS if all(key in record for key in keys)), None)
    if layout is None:
        return Broken("unknown layout")
    try:
        turns = layout(record)
        messages = [{"role": ROLE_NAMES[role.lower()], "content": clean_text(content)} for role, content in turns]
    except KeyError:
        return Broken("unknown role")
    except (TypeError, AttributeError, IndexError):
        return Broken("missing or mistyped fields")
    if not any(message["role"] == "assistant" for message in messages):
        return Broken("no answer in the row")
    if any(not message["content"] for message in messages if message["role"] != "system"):
        return Broken("empty turn")
    held_out = record.get("held_out")
    return messages, held_out if isinstance(held_out, bool) else None
