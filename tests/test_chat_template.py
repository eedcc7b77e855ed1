import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.make_tokenizer import make_tokenizer
from tests.support.texts import HOSTILE
from utils.chat_template import ROLES, encode_chat, encode_chats, trim
from utils.errors import UserError
from utils.tokenizer import N_SPECIAL, SPECIAL_TOKENS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), 420)


def conversation(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_layout_as_agreed(tokenizer):
    messages = [{"role": "system", "content": "写诗"}, *conversation("你好", "床前明月光，疑是地上霜。")]
    ids, mask = encode_chat(tokenizer, messages)
    assert tokenizer.decode(ids, skip_special=False) == (
        "<s><|im_start|>system\n写诗<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\n床前明月光，疑是地上霜。<|im_end|>\n"
    )
    assert len(mask) == len(ids)


def test_mask_falls_on_what_the_assistant_wrote(tokenizer):
    ids, mask = encode_chat(tokenizer, conversation("问一", "答一", "问二", "答二\n两行"))
    written = [token for token, on in zip(ids, mask, strict=True) if on]
    assert tokenizer.decode(written, skip_special=False) == "答一<|im_end|>答二\n两行<|im_end|>"
    prompt, prompt_mask = encode_chat(tokenizer, conversation("问一"), add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt and not any(prompt_mask)
    assert mask[len(prompt)] == 1


@pytest.mark.parametrize(
    "content,trimmed",
    [
        ("    return x\n", "    return x"),
        ("\tif a:\n\t\tb", "\tif a:\n\t\tb"),
        ("\n  \n  - a\n    b", "  - a\n    b"),
        ("\r\n    x\r\n", "    x"),
        (" \r x", " x"),
        ("a", "a"),
        (" \n\t ", ""),
        ("", ""),
    ],
)
def test_a_first_line_stays_indented(tokenizer, content, trimmed):
    assert trim(content) == trimmed == trim(trimmed)
    ids, _ = encode_chat(tokenizer, conversation("q", content))
    assert tokenizer.decode(ids, skip_special=False).endswith(f"<|im_start|>assistant\n{trimmed}<|im_end|>\n")


def test_what_is_switched_off_carries_no_loss(tokenizer):
    messages = conversation("问一", "答一", "问二", "答二")
    on = encode_chat(tokenizer, messages)
    messages[1]["loss"] = False
    ids, mask = encode_chat(tokenizer, messages)
    assert ids == on[0] and encode_chats(tokenizer, [messages]) == [(ids, mask)]
    written = [token for token, learned in zip(ids, mask, strict=True) if learned]
    assert tokenizer.decode(written, skip_special=False) == "答二<|im_end|>"


# Any characters, and the strings that mean something to the template or to the tokenizer.
PIECES = [*HOSTILE, *SPECIAL_TOKENS, "user\n", "assistant\n", "\n", " ", "。", "1", "\n    x", "\t", "\r", "  \n\t"]
ANY_TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8))).map("".join)
CHATS = st.lists(st.tuples(st.sampled_from(ROLES), ANY_TEXT), min_size=1, max_size=5).map(
    lambda turns: [{"role": role, "content": content} for role, content in turns]
)
EXAMPLES = int(os.environ.get("CHAT_EXAMPLES", 150))


@pytest.fixture(scope="module")
def theirs(tokenizer):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(str(tokenizer.path))


@settings(max_examples=EXAMPLES, deadline=None)
@given(messages=CHATS, prompt=st.booleans())
def test_ids_equal_those_of_transformers(tokenizer, theirs, messages, prompt):
    """For texts that spell no special token, which apply_chat_template would read as one."""
    tokens = theirs.all_special_tokens + list(theirs.added_tokens_encoder)
    for message in messages:
        while any(token in message["content"] for token in tokens):
            for token in tokens:
                message["content"] = message["content"].replace(token, "")
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert rendered == encode_chat(tokenizer, messages, add_generation_prompt=prompt)[0]


@settings(max_examples=EXAMPLES, deadline=None)
@given(messages=CHATS, prompt=st.booleans())
def test_ids_of_hostile_texts_equal_those_of_the_template_part_by_part(tokenizer, theirs, messages, prompt):
    """The template rendered around placeholders; its markers encoded with special tokens on, contents with them off.

    That is what apply_chat_template means; given the contents themselves it would turn a marker in them into a turn.
    """
    stand_ins = [{**message, "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
    rendered = theirs.apply_chat_template(stand_ins, add_generation_prompt=prompt, tokenize=False)
    expected, mask = [], []
    for i, part in enumerate(re.split("\ue000(\\d+)\ue001", rendered)):
        if i % 2:
            message = messages[int(part)]
            ids = theirs.encode(trim(message["content"]), add_special_tokens=False, split_special_tokens=True)
            written = message["role"] == "assistant"
            mask += [int(written)] * len(ids)
        else:
            ids = theirs.encode(part, add_special_tokens=False)
            mask += [int(i > 0 and written and at == 0) for at in range(len(ids))]  # <|im_end|> comes first in a part
        expected += ids
    assert encode_chat(tokenizer, messages, add_generation_prompt=prompt) == (expected, mask)


def test_role_markers_in_a_text_stay_text(tokenizer):
    plain, _ = encode_chat(tokenizer, conversation("a", "b"))
    count = sum(token < N_SPECIAL for token in plain)
    for text in HOSTILE:
        ids, mask = encode_chat(tokenizer, conversation(text, text))
        assert sum(token < N_SPECIAL for token in ids) == count
        assert [token for token, on in zip(ids, mask, strict=True) if on and token < N_SPECIAL] == [tokenizer.im_end_id]


def test_many_equal_one_by_one(tokenizer):
    chats = [conversation(*HOSTILE[i : i + 4]) for i in range(len(HOSTILE) - 4)]
    assert encode_chats(tokenizer, chats) == [encode_chat(tokenizer, chat) for chat in chats]


def test_unknown_role_is_refused_by_both(tokenizer):
    messages = [{"role": "wizard", "content": "x"}]
    with pytest.raises(UserError, match="wizard"):
        encode_chat(tokenizer, messages)
    transformers = pytest.importorskip("transformers")
    with pytest.raises(Exception, match="wizard"):
        transformers.AutoTokenizer.from_pretrained(str(tokenizer.path)).apply_chat_template(messages)
