"""The attention of short rows on a CPU against PyTorch's."""

import pytest
import torch

from model import layers


def inputs(heads, groups, v_dim, dtype, rows=2, tokens=7, dim=6):
    torch.manual_seed(0)
    shapes = ((heads, dim), (groups, dim), (groups, v_dim))
    return [torch.randn(rows, tokens, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


def outcome(function, tensors):
    """The output and the gradients of all inputs."""
    out = function(*tensors)
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, tensors, torch.randn(out.shape).to(out.dtype))]


def document_mask(tokens=7):
    """Two rows of two documents each, causal within."""
    docs = torch.tensor([[0] * 3 + [1] * 4, [0] * 6 + [1]])[:, :tokens]
    return (docs[:, None, :, None] == docs[:, None, None, :]) & torch.ones(tokens, tokens).tril().bool()


@pytest.mark.parametrize("heads, groups, v_dim", [(4, 4, 6), (6, 2, 6), (3, 1, 4)])
@pytest.mark.parametrize("mask", [None, document_mask()])
def test_short_attention_is_attention(heads, groups, v_dim, mask):
    """Outputs and gradients in float64, where `attention` itself takes PyTorch's way."""
    tensors = inputs(heads, groups, v_dim, torch.float64)
    seen = torch.ones(7, 7).tril().bool() if mask is None else mask[:, :, None]
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    want = outcome(lambda q, k, v: layers.attention(q, k, v, mask, 0.3), tensors)
    got = outcome(lambda q, k, v: layers._ShortAttention.apply(q, k, v, bias, 0.3), tensors)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mask", [None, document_mask()])
def test_bf16_takes_it_and_keeps_the_digits(mask, monkeypatch):
    tensors = inputs(6, 2, 6, torch.bfloat16)
    doubled = [t.detach().double().requires_grad_() for t in tensors]
    exact = outcome(lambda q, k, v: layers.attention(q, k, v, mask), doubled)
    calls, apply = [], layers._ShortAttention.apply
    monkeypatch.setattr(layers._ShortAttention, "apply", lambda *args: calls.append(args) or apply(*args))
    for got, want in zip(outcome(lambda q, k, v: layers.attention(q, k, v, mask), tensors), exact, strict=True):
        assert (got.double() - want).norm() < 0.01 * want.norm()
    assert len(calls) == 1
    with torch.no_grad():
        layers.attention(*tensors, mask)
    assert len(calls) == 1
