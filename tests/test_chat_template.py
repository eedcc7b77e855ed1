import random

import pytest

from tests.data_helpers import HOSTILE, make_tokenizer, random_text
from utils.chat_template import encode_chat, encode_chats
from utils.errors import UserError
from utils.tokenizer import N_SPECIAL


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


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


def test_ids_equal_those_of_transformers(tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tokenizer.path))
    random_ = random.Random(5)
    texts = [" 空格 ", "\n开头换行", "。标点", "\u0301组合", "12 3", "don't", "\u3000全角\u3000", "code:\n    x\n", ""]
    texts += [random_text(random_, 12) for _ in range(200)]
    for first, second in zip(texts, reversed(texts)):
        messages = [{"role": "system", "content": "s"}, *conversation(first, second, second, first)]
        for prompt in (False, True):
            rendered = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert rendered == encode_chat(tokenizer, messages, add_generation_prompt=prompt)[0], (first, second)


def test_role_markers_in_a_text_stay_text(tokenizer):
    harmless, _ = encode_chat(tokenizer, conversation("a", "b"))
    count = sum(token < N_SPECIAL for token in harmless)
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
