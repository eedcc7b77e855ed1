"""The layouts in which people publish chat examples, as turns; nothing about a turn is checked yet."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from preprocess_data.readers.chat_fields import REASONING, Unusable, is_empty, without_nulls
from utils.chat_template import ROLES as CHAT_ROLES

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "answer", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_PAIR_ROLES = {**ROLES, "input": "user", "output": "assistant"}  # fields of a turn that is a question with its answer
_ROLE_FIELDS = ("role", "from")
_CONTENT_FIELDS = ("content", "value", "text")
_SYSTEM_FIELDS = ("system", "system_prompt", "system_message")

# A record has the first of these layouts of which the fields are filled.
CONVERSATIONS = ("messages", "conversations", "conversation")
OTHER_CONVERSATIONS = ("dialogue", "dialog", "turns", "data")  # where no layout above fits: the names mean more
# (fields of the question, joined by a newline; the field of the answer)
PAIRS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("instruction", "input"), "output"),
    (("instruction", "context"), "response"),
    (("q",), "a"),
    (("input",), "output"),
    (("prompt",), "response"),
    (("prompt",), "completion"),
    (("query",), "response"),
    (("question",), "response"),
    (("question",), "answer"),
    (("prompt",), "output"),
    (("prompt",), "answer"),
    (("query",), "answer"),
    (("problem",), "solution"),
)


class RawTurn(NamedTuple):
    """A turn of a record: role and content as they are, and all fields it has.

    learned: False for an answer that carries no loss because of its place in the record.
    """

    role: Any
    content: Any
    fields: dict[str, Any]
    learned: bool = True


class Turns(NamedTuple):
    """The system prompt of the record itself, if it is read from there, and the turns of its conversation.

    is_pair: the last of them are a question and an answer in fields of the record.
    """

    system: list[RawTurn]
    turns: list[RawTurn]
    is_pair: bool = False


def find_turns(record: dict[str, Any]) -> Turns | None:
    """The turns of a record without nulls; None where no layout fits, and `Unusable` or an error for wrong types."""
    if found := next((field for field in CONVERSATIONS if _is_list(record.get(field))), None):
        return _conversation(record, found)
    pairs = [pair for pair in PAIRS if pair[1] in record and pair[0][0] in record]
    filled = [pair for pair in pairs if not is_empty(record[pair[1]]) and any(record.get(key) for key in pair[0])]
    if filled:
        return Turns(_system(record), _pair(record, *filled[0]), is_pair=True)
    if found := next((field for field in OTHER_CONVERSATIONS if _is_list(record.get(field))), None):
        return _conversation(record, found)
    if pairs:
        return Turns(_system(record), _pair(record, *pairs[0]), is_pair=True)
    found = next((field for field in CONVERSATIONS if field in record), None)
    return _conversation(record, found) if found else None


def _is_list(value: Any) -> bool:
    """Whether a field holds a list that is not empty, also as JSON text or by columns."""
    return not is_empty(value) and (
        isinstance(value, (list, dict)) or isinstance(value, str) and value.lstrip().startswith(("[", "{"))
    )


def _conversation(record: dict[str, Any], field: str) -> Turns:
    turns = [] if is_empty(record[field]) else list(turns_of(record[field]))
    has_system = bool(turns) and isinstance(turns[0].role, str) and ROLES.get(turns[0].role.lower()) == "system"
    return Turns([] if has_system else _system(record), turns)


def _pair(record: dict[str, Any], question: tuple[str, ...], answer: str) -> list[RawTurn]:
    """The history, a question and its answer, each a text or a list of turns. Answers in the question have no loss."""
    turns = list(turns_of(record.get("history") or []))
    prompt = record[question[0]]
    if conversation := _turns_in(prompt):
        turns += [turn._replace(learned=False) for turn in turns_of(conversation)]
    else:
        texts = [prompt, *(record.get(field) or "" for field in question[1:])]
        turns.append(RawTurn("user", "\n".join(text for text in texts if text != ""), {}))
    if conversation := _turns_in(record[answer]):
        return [*turns, *turns_of(conversation)]
    return [*turns, RawTurn("assistant", record[answer], {key: record[key] for key in REASONING if key in record})]


def _turns_in(value: Any) -> Any:
    """A list of turns, also as JSON text, or one turn; None for a text and for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    turns = value if isinstance(value, list) else [value]
    return turns if turns and all(isinstance(turn, dict) and _first(turn, _ROLE_FIELDS) for turn in turns) else None


def turns_of(value: Any) -> Iterator[RawTurn]:
    """The turns of a conversation, which may be JSON text.

    A list of turns with a role and a content, of questions with their answers, or of texts that alternate; or the
    columns of such a list, or one turn. `Unusable`, TypeError, ValueError or KeyError for anything else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Unusable("a conversation as text that is not JSON") from None
    if isinstance(value, dict):
        if isinstance(_first(value, _ROLE_FIELDS), str):
            value = [value]
        else:
            value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    role = "assistant"
    for item in value or []:
        for turn in _turns_of_item(item, role) if item is not None else []:
            role = turn.role
            yield turn


def _turns_of_item(item: Any, last_role: Any) -> list[RawTurn]:
    if isinstance(item, str):
        return [RawTurn("assistant" if last_role == "user" else "user", item, {})]
    if isinstance(item, list):
        question, answer = item[:2]
        item = {"user": question, "assistant": answer}
    fields = without_nulls(item)
    role = _first(fields, _ROLE_FIELDS)
    if role is not None:
        return [RawTurn(role, _first(fields, _CONTENT_FIELDS), fields)]
    pair = {_PAIR_ROLES[key.lower()]: text for key, text in fields.items() if key.lower() in _PAIR_ROLES}
    if fields and not pair:
        raise KeyError("role")
    return [RawTurn(role, pair[role], fields if role == "assistant" else {}) for role in CHAT_ROLES if role in pair]


def _first(fields: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first of some fields that is present."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _system(record: dict[str, Any]) -> list[RawTurn]:
    return [RawTurn("system", record[key], {}) for key in _SYSTEM_FIELDS if record.get(key)][:1]
