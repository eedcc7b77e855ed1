r"""The chat template, twice: as Jinja for other programs, and as code that inserts role tokens by id.

    <s><|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{content}<|im_end|>\n

Both give the same ids for the same messages. Only the code is safe for text that contains role markers: it encodes
contents with special tokens switched off, while in a rendered template such text becomes a special token.
"""

from typing import Any, Protocol

from utils.errors import UserError

Messages = list[dict[str, Any]]  # {"role", "content"}, and "loss": False in an answer that is not to be learned

ROLES = ("system", "user", "assistant")

# Contents are trimmed as `trim` does: then no token spans the newline after the role, and the loss mask never divides a
# token.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message.role not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('a role is system, user or assistant, not ' ~ message.role) }}"
    "{%- endif %}"
    "{%- set own = message.content is string or not message.content %}"
    "{%- set parts = [{'type': 'text', 'text': message.content or ''}] if own else message.content %}"
    "{%- for part in parts if part.type != 'text' %}"
    "{{- raise_exception('a part of a content is text, not ' ~ part.type) }}"
    "{%- endfor %}"
    "{%- set content = parts | map(attribute='text') | join %}"
    "{%- set text = content | trim %}"
    "{%- set indent = content.split(text)[0].replace('\\r', '\\n').split('\\n')[-1] if text else '' %}"
    "{{- '<|im_start|>' ~ message.role ~ '\\n' ~ indent ~ text ~ '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


class ChatTokenizer(Protocol):
    """What the template needs of a tokenizer; `utils.tokenizer.Tokenizer` has it."""

    prefix_ids: list[int]  # what a chat begins with: <s>, or nothing
    im_start_id: int
    im_end_id: int

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


def trim(content: str) -> str:
    """A content without blank lines around it and without spaces at its end; its first line stays indented."""
    text = content.strip()
    before = content[: len(content) - len(content.lstrip())]
    return before.replace("\r", "\n").split("\n")[-1] + text if text else ""


def has_loss(message: dict[str, Any]) -> bool:
    """Whether the content of a message and its end are learned: those of an answer whose loss is not switched off."""
    return message["role"] == "assistant" and message.get("loss", True)


def encode_chat(
    tokenizer: ChatTokenizer, messages: Messages, add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of a conversation and a mask of the same length, 1 for tokens with loss.

    These are the content of an answer and the <|im_end|> after it. With add_generation_prompt the ids end where the
    next answer begins. UserError on an unknown role.
    """
    for message in messages:
        if message["role"] not in ROLES:
            raise UserError(f"a role is system, user or assistant, not {message['role']!r}: correct the chat example")
    return _assemble(tokenizer, messages, tokenizer.encode_batch(_texts(messages)), add_generation_prompt)


def encode_chats(tokenizer: ChatTokenizer, conversations: list[Messages]) -> list[tuple[list[int], list[int]]]:
    """`encode_chat` of many conversations at once, on all cores."""
    encoded = tokenizer.encode_batch([text for messages in conversations for text in _texts(messages)])
    start = 0
    results = []
    for messages in conversations:
        end = start + 2 * len(messages)
        results.append(_assemble(tokenizer, messages, encoded[start:end], False))
        start = end
    return results


def _texts(messages: Messages) -> list[str]:
    """What is encoded: the role and the content of each message in turn."""
    return [text for message in messages for text in (message["role"] + "\n", trim(message["content"]))]


def _assemble(
    tokenizer: ChatTokenizer, messages: Messages, encoded: list[list[int]], add_generation_prompt: bool
) -> tuple[list[int], list[int]]:
    """Ids and mask; encoded: the ids of the role and of the content of each message in turn."""
    newline = tokenizer.encode("\n")
    ids = [*tokenizer.prefix_ids]
    mask = [0] * len(ids)
    for message, role, content in zip(messages, encoded[::2], encoded[1::2], strict=True):
        learned = int(has_loss(message))
        ids += [tokenizer.im_start_id, *role, *content, tokenizer.im_end_id, *newline]
        mask += [0] * (1 + len(role)) + [learned] * (len(content) + 1) + [0] * len(newline)
    if add_generation_prompt:
        prompt = [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
        ids += prompt
        mask += [0] * len(prompt)
    return ids, mask
