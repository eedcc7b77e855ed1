"""Text as it is streamed: stop strings against a search in the whole text, and never half a character."""

import random

import pytest

from engine.inference.detokenizer import Writer
from engine.inference.generate import decode, generate, new_request
from engine.inference.sampling import Sampling
from tests.support.decoding_models import V, make
from tests.support.tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))  # a token a byte: every character is cut


def first_stop(text, stop):
    """The text up to the first place where any of the strings begins."""
    places = [text.index(s) for s in stop if s in text]
    return text[: min(places)] if places else text


@pytest.mark.parametrize("seed", range(40))
def test_stop_strings_against_a_search_in_the_whole_text(tokenizer, seed):
    rng = random.Random(seed)
    alphabet = "ab春\n"
    text = "".join(rng.choices(alphabet, k=60))
    stop = ["".join(rng.choices(alphabet, k=rng.randint(1, 6))) for _ in range(rng.randint(0, 3))]
    writer, shown, expected = Writer(tokenizer, stop), "", first_stop(text, stop)
    ids = tokenizer.encode(text)
    for number, token in enumerate(ids, 1):
        writer.push(token)
        assert writer.text.startswith(shown) and expected.startswith(writer.text)  # final, and right from the start
        shown = writer.text
        whole = tokenizer.decode(ids[:number]).rstrip("\ufffd")
        assert writer.stopped == any(s in whole for s in stop)
        if writer.stopped:
            break
        longest = max(map(len, stop), default=1) - 1
        assert len(whole) - len(shown) <= longest  # no more is held back than may be a stop string
    writer.close()
    assert writer.text == expected
    lengths = [len(tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(number)]
    assert writer.starts == lengths


def test_text_that_ends_inside_a_character_or_a_stop_string(tokenizer):
    writer = Writer(tokenizer, ["###"])
    for token in tokenizer.encode("春##")[:-1] + tokenizer.encode("晓")[:2]:
        writer.push(token)
    assert writer.text == "春"  # "#" may begin a stop string
    writer.close()
    assert writer.text == "春#\ufffd" and not writer.stopped


def test_generation_ends_at_a_stop_string():
    model = make("no state")
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

    eos_id, im_end_id, special_ids = 2, 5, ()

    def __init__(self, byte):
        self.byte = byte

    def token_bytes(self, token):
        return bytes([self.byte[token]])
