r"""The chat template, twice: as Jinja for other programs, and as code that inserts role tokens by id.

    <s><|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{content}<|im_end|>\n

Both give the same ids for the same messages. Only the code is safe for text that contains role markers: it encodes
contents with special tokens switched off, while in a rendered template such text becomes a special token.
"""

from typing import Protocol

from utils.errors import UserError

Messages = list[dict[str, str]]  # {"role", "content"}

ROLES = ("system", "user", "assistant")

# Contents are trimmed: then no token spans the newline after the role, and the loss mask never divides a token.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message.role not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('a role is system, user or assistant, not ' ~ message.role) }}"
    "{%- endif %}"
    "{{- '<|im_start|>' ~ message.role ~ '\\n' ~ (message.content | trim) ~ '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


class ChatTokenizer(Protocol):
    """What the template needs of a tokenizer; `utils.tokenizer.Tokenizer` has it."""

    bos_id: int
    im_start_id: int
    im_end_id: int

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


def encode_chat(
    tokenizer: ChatTokenizer, messages: Messages, add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of a conversation and a mask of the same length, 1 for tokens of the assistant.

    These are its content and the <|im_end|> after it. With add_generation_prompt the ids end where the next answer
    begins. UserError on an unknown role.
    """
    texts = []
    for message in messages:
        if message["role"] not in ROLES:
            raise UserError(f"a role is system, user or assistant, not {message['role']!r}: correct the chat example")
        texts += [message["role"] + "\n", message["content"].strip()]
    return _assemble(tokenizer, messages, tokenizer.encode_batch(texts), add_generation_prompt)


def encode_chats(tokenizer: ChatTokenizer, conversations: list[Messages]) -> list[tuple[list[int], list[int]]]:
    """`encode_chat` of many conversations at once, on all cores."""
    texts = [text for messages in conversations for m in messages for text in (m["role"] + "\n", m["content"].strip())]
    encoded = tokenizer.encode_batch(texts)
    start = 0
    results = []
    for messages in conversations:
        end = start + 2 * len(messages)
        results.append(_assemble(tokenizer, messages, encoded[start:end], False))
        start = end
    return results


def _assemble(
    tokenizer: ChatTokenizer, messages: Messages, encoded: list[list[int]], add_generation_prompt: bool
) -> tuple[list[int], list[int]]:
    """Ids and mask; encoded: the ids of the role and of the content of each message in turn."""
    newline = tokenizer.encode("\n")
    ids = [tokenizer.bos_id]
    mask = [0]
    for message, role, content in zip(messages, encoded[::2], encoded[1::2], strict=True):
        has_loss = int(message["role"] == "assistant")
        ids += [tokenizer.im_start_id, *role, *content, tokenizer.im_end_id, *newline]
        mask += [0] * (1 + len(role)) + [has_loss] * (len(content) + 1) + [0] * len(newline)
    if add_generation_prompt:
        prompt = [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
        ids += prompt
        mask += [0] * len(prompt)
    return ids, mask
