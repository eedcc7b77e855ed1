"""The chunked recurrence against a loop over tokens in float64."""

import functools
import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.layers.recurrence import chunk, decayed_products, delta_rule, recurrence_flops

HEADS, K, V = 3, 5, 7
KINDS = ("gated delta rule", "decay per channel", "no erasing", "decay per channel, no erasing")


def by_token(q, k, v, decay, beta=None, initial=None, doc_ids=None):
    """The equations as they stand, one sequence, head and token after another."""
    out = torch.zeros_like(v)
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    final = v.new_zeros(v.shape[0], *k.shape[2:], v.shape[-1])
    for b, h in itertools.product(range(v.shape[0]), range(v.shape[2])):
        memory = torch.zeros_like(final[b, h]) if initial is None else initial[b, h]
        for t in range(v.shape[1]):
            if doc_ids is not None and t and doc_ids[b, t] != doc_ids[b, t - 1]:
                memory = torch.zeros_like(memory)
            key, value = k[b, t, h], v[b, t, h]
            memory = torch.diag(decay[b, t, h].exp().expand(len(key))) @ memory
            if beta is not None:
                value = beta[b, t, h] * (value - memory.T @ key)
            memory = memory + torch.outer(key, value)
            out[b, t, h] = memory.T @ q[b, t, h]
        final[b, h] = memory
    return out, final


def random_inputs(kind, n_tokens, seed=0, batch=2, lowest=-3.0, beta=None, dtype=torch.double):
    """q, k, v, decay, beta with decays that are often near 0 and often near `lowest`."""
    torch.manual_seed(seed)
    q, k = (torch.randn(batch, n_tokens, HEADS, K, dtype=dtype) for _ in range(2))
    k = k / k.norm(dim=-1, keepdim=True)
    v = torch.randn(batch, n_tokens, HEADS, V, dtype=dtype)
    shape = (batch, n_tokens, HEADS, K) if "channel" in kind else (batch, n_tokens, HEADS)
    decay = lowest * torch.rand(shape, dtype=dtype) ** 4
    if "no erasing" in kind:
        return q, k, v, decay, None
    random_beta = torch.rand(batch, n_tokens, HEADS, dtype=dtype) * 2
    return q, k, v, decay, random_beta if beta is None else torch.full_like(random_beta, beta)


def documents(n_tokens, batch=2):
    """A border in every place of a chunk over the sequences: documents of 1, 2, .. tokens, padding in between."""
    rows = []
    for row in range(batch):
        ids, number = [], 3
        while len(ids) < n_tokens:
            length = 1 + (number * 7 + row * 5) % 11
            ids += [-1 if number % 4 == row else number] * length
            number += 1
        rows.append(ids[:n_tokens])
    return torch.tensor(rows)


def assert_same(got, want, tolerance=1e-10):
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape and one.isfinite().all()
        assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_tokens", [1, 2, 7, 8, 9, 21])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_equal_single_tokens(kind, n_tokens, packed):
    inputs = random_inputs(kind, n_tokens, n_tokens)
    initial = torch.randn(2, HEADS, K, V, dtype=torch.double)
    doc_ids = documents(n_tokens) if packed else None
    for start, size in itertools.product((None, initial), (1, 5, 8, 64)):
        want = by_token(*inputs, start, doc_ids)
        assert_same(delta_rule(*inputs, start, doc_ids, size), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_extreme_decays(kind, beta):
    """A decay of -60 per token forgets all: -4,000 over a chunk, next to tokens that keep nearly all."""
    for seed, lowest in enumerate((-60.0, -1e-9, -20.0)):
        inputs = random_inputs(kind, 75, seed, lowest=lowest, beta=beta, batch=1)
        want = by_token(*inputs)
        assert_same(delta_rule(*inputs), want)
        assert_same(delta_rule(*inputs, doc_ids=documents(75, 1)), by_token(*inputs, doc_ids=documents(75, 1)))
        narrow = (None if x is None else x.float() for x in inputs)
        exact = [None if x is None else x.float().double() for x in inputs]
        if beta < 2:  # with beta = 2 a long product of reflections amplifies the rounding of any order of summation
            got = delta_rule(*narrow)
            assert got[0].dtype == got[1].dtype == torch.float32
            assert_same([x.double() for x in got], by_token(*exact), 1e-5)
        kept = [None if x is None else x.clone() for x in inputs]
        kept[3] = torch.full_like(kept[3], -60.0)
        assert_same(delta_rule(*kept), by_token(*kept))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_one_after_another_equal_the_sequence(kind):
    inputs = random_inputs(kind, 23)
    want = delta_rule(*inputs, chunk_size=8)
    memory, outs = None, []
    for start, end in itertools.pairwise((0, 1, 2, 10, 17, 18, 23)):
        part = (None if x is None else x[:, start:end] for x in inputs)
        out, memory = delta_rule(*part, memory, chunk_size=8)
        outs.append(out)
    assert_same((torch.cat(outs, dim=1), memory), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_knows_nothing_of_the_others(kind):
    """The gradient to their tokens is exactly zero."""
    inputs = [None if x is None else x.requires_grad_() for x in random_inputs(kind, 20, batch=1)]
    initial = torch.randn(1, HEADS, K, V, dtype=torch.double, requires_grad=True)
    doc_ids = torch.tensor([[4] * 3 + [-1] * 2 + [5] * 9 + [4] * 6])  # a number that comes again is another document
    out = delta_rule(*inputs, initial, doc_ids, chunk_size=8)[0]
    out[:, 5:14].square().sum().backward()
    for grad in (x.grad for x in inputs if x is not None):
        assert not grad[:, :5].any() and not grad[:, 14:].any() and grad[:, 5:14].any()
    assert not initial.grad.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_tokens", [1, 11])
def test_gradients(kind, n_tokens):
    inputs = list(random_inputs(kind, n_tokens, batch=1))
    inputs = [None if x is None else x[:, :, :2].contiguous().requires_grad_() for x in inputs]
    initial = torch.randn(1, 2, K, V, dtype=torch.double, requires_grad=True)
    doc_ids = torch.tensor([[0] * 3 + [1] * 8])[:, :n_tokens]
    for ids in (None, doc_ids):
        rule = functools.partial(delta_rule, doc_ids=ids, chunk_size=4)
        assert torch.autograd.gradcheck(rule, (*inputs, initial), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_tokens", [1, 13])
def test_heads_of_keys_serve_consecutive_memories(kind, n_tokens):
    q, k, v, decay, beta = random_inputs(kind, n_tokens)
    v, decay = (torch.cat((x, x.flip(1)), dim=2) for x in (v, decay))
    beta = None if beta is None else torch.cat((beta, beta.flip(1)), dim=2)
    assert_same(delta_rule(q, k, v, decay, beta, chunk_size=8), by_token(q, k, v, decay, beta))


@pytest.mark.parametrize("lowest", [-0.1, -60.0])
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 13, 16])
def test_decayed_products_equal_their_definition(lowest, n_tokens):
    torch.manual_seed(n_tokens)
    x, k = torch.randn(1, 2, n_tokens, 3, K).double(), torch.randn(1, 2, n_tokens, K).double()
    for width in (1, K):
        g = lowest * torch.rand(1, 4, n_tokens, width).double()
        got = decayed_products(x, k, g)
        for h, i, j in itertools.product(range(4), range(n_tokens), range(n_tokens)):
            fade = g[0, h, j + 1 : i + 1].sum(dim=0).exp() if j <= i else torch.zeros(width).double()
            want = x[0, h // 2, i] @ (fade * k[0, h // 2, j])
            torch.testing.assert_close(got[0, h, i, :, j], want, rtol=1e-12, atol=1e-14)


def test_autocast_and_bf16_inputs_leave_it_in_fp32():
    inputs = random_inputs(KINDS[0], 20, dtype=torch.float32)
    want = delta_rule(*inputs, chunk_size=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, delta_rule(*inputs, chunk_size=8), want))
    rounded = [x.bfloat16() for x in inputs]
    want = delta_rule(*(x.float() for x in rounded), chunk_size=8)
    assert all(map(torch.equal, delta_rule(*rounded, chunk_size=8), want))


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_the_inputs_of_a_chunk_only(kind):
    """Bytes held for the backward pass: inputs, results and a memory per chunk, and no matrix of pairs of tokens."""
    inputs = [None if x is None else x.requires_grad_() for x in random_inputs(kind, 64, dtype=torch.float32)]
    plain, kept = {}, {}

    def keep(held):
        return torch.autograd.graph.saved_tensors_hooks(
            lambda x: held.__setitem__(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) or x, lambda x: x
        )

    with keep(kept):
        got = delta_rule(*inputs, chunk_size=16)
    got[0].square().sum().backward()
    grads = [x.grad.clone() for x in inputs if x is not None]
    unwrapped = getattr(chunk, "__wrapped__", chunk)
    with pytest.MonkeyPatch.context() as patch, keep(plain):
        patch.setattr("model.layers.recurrence.chunk", unwrapped)
        out = delta_rule(*inputs, chunk_size=16)[0]
    again = torch.autograd.grad(out.square().sum(), [x for x in inputs if x is not None])
    assert all(map(torch.equal, grads, again))
    if unwrapped is not chunk:
        assert sum(kept.values()) < 0.5 * sum(plain.values())


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_matmuls(kind):
    """All matmuls are counted; torch counts no triangular solution."""
    inputs = random_inputs(kind, 64, batch=1)
    for size in (16, 64):
        with FlopCounterMode(display=False) as counter:
            delta_rule(*inputs, chunk_size=size)
        erase, per_channel = "no erasing" not in kind, "channel" in kind
        flops = recurrence_flops(HEADS, K, V, 64, size, erase, per_channel)
        solution = HEADS * size * V if erase else 0
        assert math.isclose(counter.get_total_flops() / 64, flops - solution, rel_tol=0.05)
