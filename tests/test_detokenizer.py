"""Streamed text: stop strings against a search in the full text, and no half characters."""

import random

import pytest

from engine.inference.detokenizer import StreamDetokenizer
from engine.inference.generate import decode, generate, new_request
from engine.inference.sampling import Sampling
from tests.support.decoding_models import V, build
from tests.support.make_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))  # one token per byte: every character is cut


def first_stop(text, stop):
    """The text up to the first place where any of the strings begins."""
    places = [text.index(s) for s in stop if s in text]
    return text[: min(places)] if places else text


@pytest.mark.parametrize("seed", range(40))
def test_stop_strings_against_a_search_in_the_full_text(tokenizer, seed):
    rng = random.Random(seed)
    alphabet = "ab春\n"
    text = "".join(rng.choices(alphabet, k=60))
    stop = ["".join(rng.choices(alphabet, k=rng.randint(1, 6))) for _ in range(rng.randint(0, 3))]
    detokenizer, shown, expected = StreamDetokenizer(tokenizer, stop), "", first_stop(text, stop)
    ids = tokenizer.encode(text)
    for number, token in enumerate(ids, 1):
        detokenizer.push(token)
        assert detokenizer.text.startswith(shown) and expected.startswith(detokenizer.text)  # every piece is final
        shown = detokenizer.text
        full = tokenizer.decode(ids[:number]).rstrip("\ufffd")
        assert detokenizer.stopped == any(s in full for s in stop)
        if detokenizer.stopped:
            break
        longest = max(map(len, stop), default=1) - 1
        assert len(full) - len(shown) <= longest  # only a possible stop string is held back
    detokenizer.close()
    assert detokenizer.text == expected
    lengths = [len(tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(number)]
    assert detokenizer.starts == lengths


def test_text_that_ends_inside_a_character_or_a_stop_string(tokenizer):
    detokenizer = StreamDetokenizer(tokenizer, ["###"])
    for token in tokenizer.encode("春##")[:-1] + tokenizer.encode("晓")[:2]:
        detokenizer.push(token)
    assert detokenizer.text == "春"  # "#" may begin a stop string
    detokenizer.close()
    assert detokenizer.text == "春#\ufffd" and not detokenizer.stopped


def test_generation_ends_at_a_stop_string():
    model = build("no state")
    byte = {token: token % 26 + 97 for token in range(V)}  # any text will do: ids of letters
    letters = SimpleLetters(byte)
    plain = generate(model, letters, [[1, 7]], 40, stop_ids=(), temperature=1.0, seed=0)[0]
    text = "".join(chr(byte[token]) for token in plain)
    stop = text[10:13]
    request = new_request(letters, [1, 7], 40, Sampling(1.0, seed=0), (), [stop, "never"])
    list(decode(model, [request]))
    assert request.finish == "stop" and request.text == text[: text.index(stop)]
    assert request.tokens == plain[: text.index(stop) + 3]
    assert generate(model, letters, [[1, 7]], 40, stop_ids=(), stop=[stop], temperature=1.0, seed=0) == [request.tokens]


class SimpleLetters:
    """A tokenizer whose ids are letters."""

    stop_ids, special_ids, is_byte_level = (2, 5), (), True

    def __init__(self, byte):
        self.byte = byte

    def token_bytes(self, token):
        return bytes([self.byte[token]])
