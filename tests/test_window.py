"""Sliding windows, rings and tails against loops in float64: chunks of any size, sequences apart, tokens taken back."""

import pytest
import torch

from model import State
from model.kernels import attention as kernels
from model.layers import (
    attention,
    packed_window_mask,
    recent,
    sink_attention,
    token_positions,
    window_append,
    window_mask,
)
from tests.support.attention_reference import GROUPS, HEADS, attention_loop, random_attention

B, T = 3, 40
WINDOWS = (1, 5, 9, T + 3, None)
CHUNKS = [[1] * T, [12, 1, 3, 14, 10], [3, 9, 10, 1, 1, 2, 14], [20, *[1] * 20], [1, 39], [T]]


def new_state(batch=B, max_len=T):
    return State(torch.zeros(batch, dtype=torch.long), max_len, [{}])


def read(state, tensors, n_tokens, window, start=None):
    """Attention of the next tokens of each sequence, which begin at `start` (B,) in q, k, v."""
    q, k, v, sink = tensors
    positions = state.positions(n_tokens)
    rows = torch.arange(len(positions))[:, None]
    q, k, v = (x[rows, positions if start is None else start[:, None] + torch.arange(n_tokens)] for x in (q, k, v))
    k, v = window_append(state, 0, "k", k, window), window_append(state, 0, "v", v, window)
    out = sink_attention(q, k, v, sink, packed_window_mask(positions, state, None, window))
    state.advance(n_tokens)
    return out


@pytest.mark.parametrize("window", WINDOWS)
def test_a_mask_of_a_forward_hides_what_is_older(window):
    q, k, v, sink = random_attention(B, T)
    doc_ids = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 3, 3] * 3 + [-1] * 4).expand(B, T).clone()
    doc_ids[1] = 0
    positions = token_positions(doc_ids)
    for docs in (None, doc_ids):
        want = attention_loop(q, k, v, None, window, docs)
        for mask in (window_mask, packed_window_mask):
            got = attention(q, k, v, mask(positions, None, docs, window))
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert window_mask(positions, None, None, T) is None
    with pytest.raises(ValueError, match="doc_ids and state"):
        state = new_state()
        state.max_pos = 3
        window_mask(positions, state, doc_ids, 5)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", CHUNKS)
def test_chunks_and_steps_are_the_full_forward(window, sizes):
    tensors = random_attention(B, T)
    state = new_state()
    got = torch.cat([read(state, tensors, size, window) for size in sizes], dim=1)
    torch.testing.assert_close(got, attention_loop(*tensors, window), rtol=1e-10, atol=1e-10)
    size = T if window is None else window + state.room
    assert state.layers[0]["k"].shape[1] == size and state.rewindable == {"k", "v"}


@pytest.mark.parametrize("window", [1, 5, None])
def test_sequences_stand_apart(window):
    """Prompts of several lengths in used slots; then steps and chunks, also longer than a ring takes."""
    tensors = random_attention(B, T)
    want = attention_loop(*tensors, window)
    batch = new_state(max_len=2 * T)
    read(batch, [x.flip(1) if x.ndim > 1 else x for x in tensors], 13, window)
    lengths = [0, 17, 4]
    for row, length in enumerate(lengths):
        alone = new_state(1, 2 * T)
        if length:
            read(alone, [x[row : row + 1] if x.ndim > 1 else x for x in tensors], length, window)
        batch.overwrite([row], alone)
    at = torch.tensor(lengths)
    for size in (1, 2, 10, 1, 9):
        got = read(batch, tensors, size, window)
        index = at[:, None] + torch.arange(size)
        torch.testing.assert_close(got, want[torch.arange(B)[:, None], index], rtol=1e-10, atol=1e-10)
        at = at + size
    picked = batch.select([2, 0])
    got = read(picked, [x[[2, 0]] if x.ndim > 1 else x for x in tensors], 1, window)
    torch.testing.assert_close(got[:, 0], want[[2, 0], at[[2, 0]]], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [1, 5, 11, None])
def test_up_to_room_tokens_can_be_taken_back(window):
    """At every position, after a step, a chunk or a long chunk of other tokens."""
    tensors = random_attention(1, T)
    other = [x.flip(1) if x.ndim > 1 else x for x in tensors]
    want = attention_loop(*tensors, window)
    state = new_state(1, 2 * T)
    room = state.room
    out = []
    for t in range(T - 1):
        for n_tokens in (1, room, room + 5):
            trial = state.clone()
            kept = n_tokens - min(n_tokens, room)  # of a chunk longer than that, the first tokens stay
            if t + n_tokens > T:
                continue
            mixed = [
                torch.cat((x[:, : t + kept], y[:, t + kept :]), dim=1) if x.ndim > 1 else x
                for x, y in zip(tensors, other)
            ]
            read(trial, mixed, n_tokens, window)
            trial.rewind(n_tokens - kept)
            if t + kept + 2 <= T:
                got = read(trial, tensors, 2, window)
                torch.testing.assert_close(got, want[:, t + kept : t + kept + 2], rtol=1e-10, atol=1e-10)
        out.append(read(state, tensors, 1, window))
    torch.testing.assert_close(torch.cat(out, dim=1), want[:, : T - 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [0, 1, 3, 12])
@pytest.mark.parametrize("layer", [0, None])
def test_recent_inputs_are_those_before_the_new_ones(size, layer):
    """Of numbers and of ids; of each sequence its own, zeros before its start, and after tokens are taken back."""
    for x in (torch.randn(B, T, 2), torch.randint(1, 9, (B, T))):
        padded = torch.cat((x.new_zeros(B, size, *x.shape[2:]), x), dim=1)
        torch.testing.assert_close(recent(None, layer, "x", x, size), padded)
        state = new_state()
        at = 0
        for n_tokens in (2, 1, 1, 11, 1, 3, 20):
            for trial in (1, state.room):
                recent(state, layer, "x", x[:, :trial] + 5, size)
                state.advance(trial)
                state.rewind(trial)
                if at + state.room > T - 8:
                    break
            got = recent(state, layer, "x", x[:, at : at + n_tokens], size)
            torch.testing.assert_close(got, padded[:, at : at + size + n_tokens])
            state.advance(n_tokens)
            at += n_tokens
        assert state.can_rewind() and [*(state.layers[0] or state.model)] == ["x"]
        state.overwrite([1], new_state(1))  # another text begins there
        rows = torch.arange(B)
        got = recent(state.select([1]), layer, "x", x[:1, :1], size)
        torch.testing.assert_close(got[:, :size], torch.zeros_like(got[:, :size]))
        assert len(rows) == B


def test_blocks_for_flex_attention_are_those_of_the_dense_mask():
    n_tokens, window = 300, 70
    doc_ids = (torch.arange(n_tokens) // 90).expand(2, n_tokens).clone()
    doc_ids[1, -40:] = -1
    positions = token_positions(doc_ids)
    for docs in (None, doc_ids):
        dense = window_mask(positions, None, docs, window)
        blocks = kernels.window_blocks(positions, window, docs)
        seen = torch.nn.attention.flex_attention.create_mask(blocks.mask_mod, len(dense), 1, n_tokens, n_tokens, "cpu")
        assert torch.equal(seen, dense)
        assert not blocks.to_dense().tril().all()  # there are some to leave out


def test_groups_of_heads():
    assert HEADS // GROUPS > 1
