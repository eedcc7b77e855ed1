"""Chat examples as messages: a list of {"role", "content"}, with "loss": False in an answer that is not learned."""

from typing import Any, NamedTuple

from preprocess_data.readers import chat_fields
from preprocess_data.readers.chat_fields import Unusable, are_learned, without_nulls
from preprocess_data.readers.chat_layouts import ROLES, RawTurn, find_turns
from preprocess_data.readers.encoding import why_surrogates
from preprocess_data.readers.records import InvalidRecord
from utils.chat_template import Messages
from utils.text import clean_text, has_surrogates

TOOL_ROLES = (
    "tool", "function", "observation", "tool_call", "tool_response", "function_call", "function_response", "ipython",
)  # fmt: skip
# Records of other stages, by a field that only they have.
OTHER_RECORDS = {
    "input_ids": "tokens, not text",
    "rejected": "a preference pair, for another stage than sft",
    "non_preferred_output": "a preference pair, for another stage than sft",
    "text": "a text, for pretrain",
    "role": "a turn, not a conversation",
    "from": "a turn, not a conversation",
    "prompt": "no answer in the row",
}
# Types of the parts of a content that are not text.
OTHER_PARTS = (
    "image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio", "file", "tool_use",
    "tool_result",
)  # fmt: skip


class ChatExample(NamedTuple):
    """A conversation with an answer; whether it is marked as held out, and the names of fields that are left out."""

    messages: Messages
    held_out: bool | None = None
    unread: frozenset[str] = frozenset()


def to_messages(record: Any) -> ChatExample | InvalidRecord:
    """A record as a chat example, or why it is none."""
    if isinstance(record, InvalidRecord):
        return record
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        return InvalidRecord("not a chat row")
    unread: set[str] = set()
    try:
        messages = _messages(without_nulls(record), unread)
    except Unusable as error:
        return InvalidRecord(str(error))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError):
        return InvalidRecord("missing or mistyped fields")
    if not any(message["role"] == "assistant" for message in messages):
        return InvalidRecord("no answer in the row")
    if any(not message["content"] for message in messages if message["role"] != "system"):
        return InvalidRecord("empty turn")
    held_out = record.get("held_out")
    return ChatExample(messages, held_out if isinstance(held_out, bool) else None, frozenset(unread))


def _messages(record: dict[str, Any], unread: set[str]) -> Messages:
    found = find_turns(record)
    if found is None:
        record = {key.lower(): value for key, value in record.items()}
        found = find_turns(record)
    if found is None:
        raise Unusable(next((reason for field, reason in OTHER_RECORDS.items() if field in record), "unknown layout"))
    chat_fields.check_record(record, unread)
    if not found.is_pair and chat_fields.reasoning_of(record, unread):
        unread.add("reasoning next to a conversation")  # of which answer is not known
    turns = [*found.system, *found.turns]
    messages: Messages = []
    roles = [_role(turn.role) for turn in turns]
    for role, turn, learned in zip(roles, turns, are_learned(record, roles, len(found.turns), unread), strict=True):
        messages.append({"role": role, "content": _content(role, turn, unread)})
        if role == "assistant" and not (learned and turn.learned and chat_fields.is_learned(turn.fields, unread)):
            messages[-1]["loss"] = False
    return messages


def _role(role: str) -> str:
    name = role.lower()
    if name in TOOL_ROLES:
        raise Unusable(f"a turn of the role {name}")
    if name not in ROLES:
        raise Unusable("unknown role")
    return ROLES[name]


def _content(role: str, turn: RawTurn, unread: set[str]) -> str:
    """The cleaned text of a turn; that of an answer begins with its reasoning, as <think>...</think>."""
    chat_fields.check_turn(turn.fields, role == "assistant", unread)
    content: Any = turn.fields.get("refusal") if turn.content is None else turn.content
    reasoning = chat_fields.reasoning_of(turn.fields, unread)
    if isinstance(content, (list, dict)):
        parts = [part for part in content if part is not None] if isinstance(content, list) else [content]
        content = "".join(map(_text_of_part, parts))
        reasoning = reasoning or "".join(map(_reasoning_of_part, parts))
    text = _clean(content)
    if not reasoning or not text or (reasoning := _clean(reasoning)) in text:
        return text
    if role != "assistant" or text.startswith("<think>"):
        unread.add("reasoning next to that in the text" if role == "assistant" else f"reasoning of the {role}")
        return text
    return f"<think>\n{reasoning}\n</think>\n\n{text}"


def _clean(text: str) -> str:
    cleaned = clean_text(text)
    if cleaned is not text and has_surrogates(text):
        raise Unusable(why_surrogates(text))
    return cleaned


def _text_of_part(part: Any) -> str:
    """The text of a part of a content; "" for its reasoning, `Unusable` for what is no text."""
    if isinstance(part, str):
        return part
    fields = without_nulls(part)
    kind = fields.get("type", "text")
    if kind in OTHER_PARTS:
        raise Unusable(f"{kind}, which cannot be read")
    if kind in ("thinking", "reasoning"):
        return ""
    return [fields[name] for name in ("text", "content", "refusal") if name in fields][0]


def _reasoning_of_part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") not in ("thinking", "reasoning"):
        return ""
    return next((part[name] for name in ("thinking", "reasoning", "text") if isinstance(part.get(name), str)), "")
