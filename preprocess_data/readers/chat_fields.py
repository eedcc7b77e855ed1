"""Fields next to the text of a chat example: what switches its loss off, its reasoning, and what cannot be read."""

import json
from typing import Any

# A number or a boolean: 0 or false means that the turn, or all turns of the record, carry no loss.
LEARNED = (
    "weight", "loss", "loss_weight", "loss_mask", "loss_scale", "step_loss_mask", "train", "training", "train_on_turn",
    "trainable", "train_turns",
)  # fmt: skip
MASKED = ("masked",)  # true means the same
REJECTED = ("label", "kto_tag")  # of a record: false marks an answer as a bad example
PARTS = ("train_detail", "training_detail")  # a list of {"begin_offset", "end_offset", "train"}
TOKEN_MASKS = ("assistant_masks", "assistant_mask", "completion_mask", "mask")
REASONING = (
    "reasoning_content", "reasoning", "thinking", "thought", "thoughts", "think", "cot", "complex_cot",
    "chain_of_thought",
)  # fmt: skip
# Without these the text has lost its meaning.
NEEDED = (
    "tool_calls", "function_call", "images", "image", "image_url", "videos", "video", "audios", "audio", "input_audio",
)  # fmt: skip
# Without these the text is still an answer; there is one warning about how many records have them.
UNREAD = ("tools", "functions", "documents", "attachments", "files", "chat_template_kwargs")
UNREAD_OF_TURN = ("name",)
_TRAIN = ("train", "training", "train_on_turn", "trainable")  # would turn the loss of a question on, too
_NOTABLE = frozenset(
    (*LEARNED, *MASKED, *REJECTED, *PARTS, *TOKEN_MASKS, *REASONING, *NEEDED, *UNREAD, *UNREAD_OF_TURN)
)
_NOT_REASONING = {"on", "off", "true", "false", "yes", "no", "none", "low", "medium", "high"}  # a setting, not a text
_ON = {"1", "1.0", "true", "yes", "on"}
_OFF = {"0", "0.0", "false", "no", "off"}


class Unusable(Exception):
    """A record that cannot be used as a chat example; the message is the reason."""


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing, as JSON text, too."""
    return value is None or value in ("", [], {}, "[]", "{}", "null")


def without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null and not NaN, which tables have in its place."""
    return {key: value for key, value in fields.items() if value is not None and value == value}


def check_record(record: dict[str, Any], unread: set[str]) -> None:
    """Raise `Unusable` for a field without which the text has lost its meaning; add to `unread` what is left out."""
    if not _NOTABLE.isdisjoint(record):
        _check(record, UNREAD, unread)


def check_turn(fields: dict[str, Any], is_answer: bool, unread: set[str]) -> None:
    """The same for the fields of a turn."""
    if not _NOTABLE.isdisjoint(fields):
        _check(fields, (*UNREAD, *UNREAD_OF_TURN), unread)
        if not is_answer and any(str(fields.get(name)).lower() in _ON for name in _TRAIN):
            unread.add("loss on a turn that is no answer")


def _check(fields: dict[str, Any], names: tuple[str, ...], unread: set[str]) -> None:
    for name in NEEDED:
        if not is_empty(fields.get(name)):
            raise Unusable(f"{name}, which cannot be read")
    unread.update(name for name in names if not is_empty(fields.get(name)))


def reasoning_of(fields: dict[str, Any], unread: set[str]) -> str:
    """The reasoning before an answer, or ""."""
    if _NOTABLE.isdisjoint(fields):
        return ""
    found = {name: fields[name] for name in REASONING if not is_empty(fields.get(name))}
    unread.update(name for name, value in found.items() if isinstance(value, (list, dict)))
    texts = (value for value in found.values() if isinstance(value, str))
    return next((text for text in texts if text.strip().lower() not in _NOT_REASONING), "")


def is_learned(fields: dict[str, Any], unread: set[str]) -> bool:
    """Whether the loss of a turn is on. `Unusable` where it is on for a part of it."""
    if _NOTABLE.isdisjoint(fields):
        return True
    learned = True
    for name in (*LEARNED, *MASKED):
        if not is_empty(value := fields.get(name)):
            if isinstance(value, list):
                raise Unusable(f"{name}: loss on a part of a turn")
            learned &= _switch(name, value, unread)
    for name in PARTS:
        flags = {_switch(name, part.get("train"), unread) for part in fields.get(name) or []}
        if len(flags) > 1:
            raise Unusable(f"{name}: loss on a part of a turn")
        learned &= flags != {False}
    for name in TOKEN_MASKS:
        value = fields.get(name)
        if not is_empty(value) and str(value).lower() not in ("user", "human"):  # `"mask": "User"` masks the questions
            raise Unusable(f"{name}: which turns carry loss is not clear")
    return learned


def _switch(name: str, value: Any, unread: set[str]) -> bool:
    """Whether a switch leaves the loss on. One that is neither 0 nor 1 is added to `unread`; if negative, it is off."""
    text = str(value).strip().lower()
    if text in _ON or text in _OFF:
        return (text in _ON) != (name in MASKED)
    unread.add(f"{name} other than 0 and 1")
    return not isinstance(value, (int, float)) or value > 0


def are_learned(record: dict[str, Any], roles: list[str], own: int, unread: set[str]) -> list[bool]:
    """Whether a record leaves the loss of its turns on, by turn.

    roles: of all turns, of which the last `own` are written in the record's conversation. A list in the record has a
    switch for each of these, or for each answer; `Unusable` for one of another length.
    """
    metadata = record.get("metadata")
    if isinstance(metadata, dict) and "train_turns" in metadata:
        record = {"train_turns": metadata["train_turns"], **record}
    if _NOTABLE.isdisjoint(record):
        return [True] * len(roles)
    fields = {**record, **{name: _parsed(record[name]) for name in (*LEARNED, *MASKED) if name in record}}
    lists = {name: fields.pop(name) for name in (*LEARNED, *MASKED) if isinstance(fields.get(name), list)}
    is_on = is_learned(fields, unread) and not any(record.get(name) is False for name in REJECTED)
    learned = [is_on] * len(roles)
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    for name, flags in lists.items():
        turns = {own: list(range(len(roles) - own, len(roles))), len(answers): answers}.get(len(flags))
        if turns is None and flags:
            raise Unusable(f"{name}: not one per turn")
        for turn, flag in zip(turns or [], flags):
            learned[turn] &= is_empty(flag) or _switch(name, flag, unread)
    return learned


def _parsed(value: Any) -> Any:
    """A list that is JSON text; anything else as it is."""
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value
