"""Packed sequences against a token-by-token reading of them, over random conversations."""

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.packing import best_fit
from engine.data.sequences import IGNORE, DocumentSequences
from engine.data.token_file import TokenFile
from engine.training.evaluate import held_out_loss
from tests.support.make_tokenizer import make_tokenizer
from tests.support.texts import HOSTILE, SENTENCES
from utils.chat_template import encode_chat
from utils.errors import UserError

TOKENIZER = SimpleNamespace(
    bos_id=1, bos_is_unique=True, pad_id=3, vocab_size=1 << 20, fingerprint="f", path="tokenizer"
)
FIRST = 100  # the token at place p of a file is FIRST + p: which one it is can be read off its id


def token_file(folder, lengths, mask=None):
    tokens = FIRST + np.arange(sum(lengths), dtype="<u4")
    tokens.tofile(folder / "d.bin")
    np.save(folder / "d.docs.npy", np.cumsum([0, *lengths[:-1]]).astype(np.uint64))
    (folder / "d.meta.json").write_text(json.dumps({"dtype": "uint32", "tokens": len(tokens)}))
    if mask is not None:
        np.array(mask, np.uint8).tofile(folder / "d.mask.bin")
    return TokenFile(folder / "d.bin", TOKENIZER, "make")


def one_by_one(widths, capacity):
    """Best-fit decreasing as the paper states it: the free space of every sequence at its end."""
    free = []
    for width in sorted(widths, reverse=True):
        fitting = [sequence for sequence, places in enumerate(free) if places >= width]
        if fitting:
            free[min(fitting, key=free.__getitem__)] -= width
        else:
            free.append(capacity - width)
    return free


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40).flatmap(
        lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), min_size=1, max_size=120))
    )
)
def test_best_fit_equals_packing_one_piece_after_another(case):
    capacity, widths = case
    packing = best_fit(np.array(widths), capacity)
    assert sorted(packing.pieces.tolist()) == list(range(len(widths)))
    free = [capacity - sum(widths[piece] for piece in packing[sequence]) for sequence in range(len(packing))]
    assert sorted(free) == sorted(one_by_one(widths, capacity))


def test_best_fit_fills_sequences():
    """Lengths as chats have them: many short ones, few long."""
    widths = np.minimum(np.random.default_rng(0).lognormal(4.3, 0.7, 20_000).astype(int) + 1, 512)
    assert widths.sum() / (len(best_fit(widths, 512)) * 512) > 0.99


conversations = st.lists(st.lists(st.booleans(), min_size=2, max_size=40), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(conversations, st.integers(2, 40), st.sampled_from(["drop", "cut", "split"]), st.booleans())
def test_every_target_that_fits_occurs_exactly_once(tmp_path_factory, masks, seq_len, long, pack):
    folder = tmp_path_factory.mktemp("chat")
    lengths = [len(mask) for mask in masks]
    file = token_file(folder, lengths, np.concatenate(masks))
    expected, place, left_out = [], 0, 0
    for mask in masks:
        reach = len(mask) if long == "split" else min(len(mask), seq_len + 1)
        gone = len(mask) > seq_len + 1 and (long == "drop" or long == "cut" and not any(mask[1:reach]))
        left_out += gone
        expected += [(FIRST + place + i - 1, FIRST + place + i) for i in range(1, reach) if mask[i] and not gone]
        place += len(mask)
    if left_out == len(masks):
        with pytest.raises(UserError, match="raise it"):
            DocumentSequences(file, seq_len, pack, long)
        return
    data = DocumentSequences(file, seq_len, pack, long)
    assert data.dropped == left_out and data.too_long == sum(n > seq_len + 1 for n in lengths)
    starts, found = set(np.cumsum([0, *lengths[:-1]]) + FIRST), []
    for index in range(len(data)):
        sequence = {key: value.tolist() for key, value in data.sequence(index).items()}
        assert all(len(value) == seq_len for value in sequence.values())
        found += [pair for pair in zip(sequence["input_ids"], sequence["targets"]) if pair[1] != IGNORE]
        for at in range(seq_len):
            token, same = sequence["input_ids"][at], at and sequence["doc_ids"][at] == sequence["doc_ids"][at - 1]
            if token == TOKENIZER.pad_id:
                assert sequence["targets"][at] == IGNORE and (sequence["input_ids"][at - 1] == token) == bool(same)
            elif same:  # what an input sees before it is what precedes it in its own document
                assert token == sequence["input_ids"][at - 1] + 1 and token not in starts
            else:
                assert token in starts or long == "split"
        assert len(set(sequence["doc_ids"])) == 1 + sum(
            a != b for a, b in zip(sequence["doc_ids"], sequence["doc_ids"][1:])
        )
        assert pack or sequence["input_ids"][0] != TOKENIZER.pad_id and len(set(sequence["doc_ids"])) <= 2
    assert sorted(found) == sorted(expected)


def test_long_conversations_by_policy(tmp_path):
    file = token_file(tmp_path, [6, 30, 7], [1] * 43)
    dropped, cut = DocumentSequences(file, 16, True, "drop"), DocumentSequences(file, 16, True, "cut")
    assert dropped.summary().endswith(
        "d.bin: 3 conversations, 1 sequences of 16 tokens, 68.8% full; 1 longer than a sequence: 1 dropped"
    )
    assert cut.summary().endswith("2 sequences of 16 tokens, 84.4% full; 1 longer than a sequence: 1 cut")
    with pytest.raises(UserError, match="1 documents .* longer than --max_seq_len=16, .* 29 tokens") as error:
        DocumentSequences(file, 16, True, "error")
    assert "\n" not in str(error.value)


def test_bits_per_character_are_of_the_conversations_that_are_kept(tmp_path):
    """A model that knows nothing needs log2 V bits per token; the long chat, dropped, must not enter the rate."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer", 420)
    chats = [[("user", "问" * 5), ("assistant", text)] for text in [*SENTENCES, *HOSTILE[:6], "aé床🙂" * 90]]
    encoded = [encode_chat(tokenizer, [{"role": role, "content": text} for role, text in chat]) for chat in chats]
    np.concatenate([ids for ids, _ in encoded]).astype("<u2").tofile(tmp_path / "d.bin")
    np.concatenate([mask for _, mask in encoded]).astype(np.uint8).tofile(tmp_path / "d.mask.bin")
    (tmp_path / "d.meta.json").write_text("{}")
    data = DocumentSequences(TokenFile(tmp_path / "d.bin", tokenizer, "make"), 256, True, "drop")
    assert data.dropped == 1

    class Uniform(torch.nn.Module):
        def forward(self, input_ids, targets, doc_ids):
            return None, torch.tensor(math.log(tokenizer.vocab_size)), {}

    model = Uniform()
    result = held_out_loss(model, model, data, tokenizer.characters, 2, 0, torch.device("cpu"), contextlib.nullcontext)
    kept = list(zip(encoded, chats))[:-1]
    targets, characters = sum(sum(mask) for (_, mask), _ in kept), sum(len(chat[1][1].strip()) for _, chat in kept)
    assert result["val_targets"] == targets
    assert result["val_bpc"] == pytest.approx(targets * math.log2(tokenizer.vocab_size) / characters)
