r"""The chat layout, twice: as jinja for other programs, and as code that writes role tokens by id.

    <s><|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{content}<|im_end|>\n

Both give the same ids for the same messages. Only the code is safe with text that holds role markers: it encodes
contents with special tokens switched off, while a rendered template is one string in which a marker is a marker.
"""

from utils.errors import UserError

ROLES = ("system", "user", "assistant")

# Contents are trimmed: then a token never spans the newline after the role, and the loss mask falls on whole tokens.
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


def encode_chat(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """Ids of a conversation and a mask of the same length, 1 where the assistant wrote the token.

    The assistant writes its content and the <|im_end|> after it. With add_generation_prompt the ids end where the
    next answer begins. UserError on an unknown role.
    """
    texts = []
    for message in messages:
        if message["role"] not in ROLES:
            raise UserError(f"a role is system, user or assistant, not {message['role']!r}: correct the chat row")
        texts += [message["role"] + "\n", message["content"].strip()]
    return _lay_out(tokenizer, messages, tokenizer.encode_batch(texts), add_generation_prompt)


def encode_chats(tokenizer, conversations: list[list[dict]]) -> list[tuple[list[int], list[int]]]:
    """`encode_chat` of many conversations at once, on all cores."""
    texts = [text for messages in conversations for m in messages for text in (m["role"] + "\n", m["content"].strip())]
    encoded, start, rows = tokenizer.encode_batch(texts), 0, []
    for messages in conversations:
        end = start + 2 * len(messages)
        rows.append(_lay_out(tokenizer, messages, encoded[start:end], False))
        start = end
    return rows


def _lay_out(tokenizer, messages, encoded, add_generation_prompt) -> tuple[list[int], list[int]]:
    newline = tokenizer.encode("\n")
    ids, mask = [tokenizer.bos_id], [0]
    for message, role, content in zip(messages, encoded[::2], encoded[1::2], strict=True):
        written = int(message["role"] == "assistant")
        ids += [tokenizer.im_start_id, *role, *content, tokenizer.im_end_id, *newline]
        mask += [0] * (1 + len(role)) + [written] * (len(content) + 1) + [0] * len(newline)
    if add_generation_prompt:
        prompt = [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
        ids, mask = ids + prompt, mask + [0] * len(prompt)
    return ids, mask
