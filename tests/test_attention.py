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


@pytest.mark.parametrize("heads, groups, v_dim", [(4, 4, 6), (6, 2, 6), (3, 1, 4)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_query_a_row(heads, groups, v_dim, compiled):
    """Each row at its own position, beside the formula a head at a time; compiled it is a sum, in fp32 inside."""
    torch.manual_seed(0)
    q, k = torch.randn(3, 1, heads, 6), torch.randn(3, 9, groups, 6)
    v = torch.randn(3, 9, groups, v_dim)
    mask = (torch.arange(9) <= torch.tensor([[0], [4], [8]]))[:, None, None]
    attention = torch.compile(layers.attention) if compiled else layers.attention
    got = attention(q, k, v, mask, 0.3)
    assert got.shape == (3, 1, heads, v_dim)
    for row, last in enumerate((0, 4, 8)):
        for head in range(heads):
            group = head // (heads // groups)
            keys, values = k[row, : last + 1, group].double(), v[row, : last + 1, group].double()
            want = (0.3 * keys @ q[row, 0, head].double()).softmax(dim=0) @ values
            torch.testing.assert_close(got[row, 0, head].double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, layers.SMALL, layers.SMALL + 1])
def test_a_small_product_compiled(rows):
    """In bf16: the sum keeps more digits than a product of that type promises."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, rows, 24).bfloat16(), torch.randn(2, 3, 24, 5).bfloat16()
    exact = a.double() @ b.double()
    got = torch.compile(layers.small_matmul)(a, b)
    assert got.dtype == torch.bfloat16 and (got.double() - exact).norm() < 0.005 * exact.norm()
