"""The CPU forms: attention in blocks and of one query, norms in bf16."""

import pytest
import torch

from model import layers
from model.kernels import ENABLED, cpu_attention
from model.kernels import attention as kernels
from model.kernels.matmul import FEW_ROWS


def inputs(heads, groups, v_dim, dtype, batch_size=2, tokens=7, dim=6):
    torch.manual_seed(0)
    shapes = ((heads, dim), (groups, dim), (groups, v_dim))
    return [torch.randn(batch_size, tokens, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


def outcome(function, tensors):
    """The output and the gradients of all inputs."""
    out = function(*tensors)
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, tensors, torch.randn(out.shape).to(out.dtype))]


def document_mask(tokens=7):
    """Two sequences of two documents each, causal within."""
    docs = torch.tensor([[0] * 3 + [1] * 4, [0] * 6 + [1]])[:, :tokens]
    return (docs[:, None, :, None] == docs[:, None, None, :]) & torch.ones(tokens, tokens).tril().bool()


def both_ways_mask(tokens=7):
    """A mask that a model may use: not causal, one for the full batch."""
    return (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()[None, None] < 3


def short_mask(tokens=7):
    """No query sees the last two keys, and later queries see fewer keys than the first."""
    return both_ways_mask(tokens).flip(2) & (torch.arange(tokens) < tokens - 2)


@pytest.mark.parametrize("heads, groups, v_dim", [(4, 4, 6), (6, 2, 6), (3, 1, 4)])
@pytest.mark.parametrize("mask", [None, document_mask(), both_ways_mask(), short_mask()])
@pytest.mark.parametrize("block", [2, 3, 64])
def test_blocked_attention_is_attention(heads, groups, v_dim, mask, block, monkeypatch):
    """Outputs and gradients in float64, where `attention` itself takes PyTorch's way."""
    monkeypatch.setattr(cpu_attention, "BLOCK", block)
    tensors = inputs(heads, groups, v_dim, torch.float64)
    want = outcome(lambda q, k, v: layers.attention(q, k, v, mask, 0.3), tensors)
    got = outcome(lambda q, k, v: cpu_attention.blocked_attention(q, k, v, mask, 0.3), tensors)
    torch.testing.assert_close(got, want)


def test_a_block_reads_no_key_after_its_last_visible_one(monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", 3)
    assert cpu_attention.keys_per_block(None, 7, 7) == [3, 6, 7]
    assert cpu_attention.keys_per_block(document_mask(), 7, 7) == [3, 6, 7]
    assert cpu_attention.keys_per_block(both_ways_mask(), 7, 7) == [5, 7, 7]
    assert cpu_attention.keys_per_block(torch.zeros(2, 1, 4, 9, dtype=torch.bool), 4, 9) == [1, 1]


def test_fewer_queries_than_keys(monkeypatch):
    """As where a gradient is taken through a state: the last queries of a sequence, each up to itself."""
    monkeypatch.setattr(cpu_attention, "BLOCK", 2)
    tensors = inputs(6, 2, 6, torch.float64)
    tensors[0] = tensors[0].detach()[:, 4:].requires_grad_()
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[4:].expand(2, 1, 3, 7)
    want = outcome(lambda q, k, v: layers.attention(q, k, v, mask), tensors)
    got = outcome(lambda q, k, v: cpu_attention.blocked_attention(q, k, v, mask, 6**-0.5), tensors)
    torch.testing.assert_close(got, want)


@pytest.mark.skipif(not ENABLED, reason="MINI_LLM_KERNELS=0: blocked attention is off")
@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.01), (torch.float32, 1e-6)])
@pytest.mark.parametrize("mask", [None, document_mask()])
def test_training_on_a_cpu_uses_it_without_loss_of_precision(mask, dtype, error, monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", 3)
    tensors = inputs(6, 2, 6, dtype)
    doubled = [t.detach().double().requires_grad_() for t in tensors]
    exact = outcome(lambda q, k, v: layers.attention(q, k, v, mask), doubled)
    calls, real = [], cpu_attention.blocked_attention
    monkeypatch.setattr(kernels, "blocked_attention", lambda *args: calls.append(args) or real(*args))
    for got, want in zip(outcome(lambda q, k, v: layers.attention(q, k, v, mask), tensors), exact, strict=True):
        assert (got.double() - want).norm() < error * want.norm()
    assert len(calls) == 1
    with torch.no_grad():
        layers.attention(*tensors, mask)
    assert len(calls) == 1


def test_fp32_under_autocast_stays_fp32():
    """As in a model that leaves the smaller type for attention; the backward pass runs outside of autocast."""
    tensors = inputs(6, 2, 6, torch.float32)
    want = outcome(lambda q, k, v: layers.attention(q, k, v), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        out = layers.attention(*tensors)
    torch.manual_seed(1)
    got = [out.detach(), *torch.autograd.grad(out, tensors, torch.randn(out.shape))]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.01 * b.norm()


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, document_mask(), both_ways_mask()])
def test_blocks_compiled(mask, monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", 3)
    tensors = inputs(6, 2, 6, torch.float32)
    want = outcome(lambda q, k, v: layers.attention(q, k, v, mask), tensors)
    got = outcome(torch.compile(lambda q, k, v: layers.attention(q, k, v, mask), fullgraph=True), tensors)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("heads, groups, v_dim", [(4, 4, 6), (6, 2, 6), (3, 1, 4)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_query_per_sequence(heads, groups, v_dim, compiled):
    """Each sequence at its own position, against the formula per head; compiled it is a sum, in fp32 inside."""
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


@pytest.mark.parametrize("shape", [(2, 7, 24), (5, 24), (2, 3, 4, 24), (24,), (0, 24)])
def test_a_norm_in_bf16_on_a_cpu(shape):
    """Its output and gradients, against the formula in float64 (Zhang & Sennrich 2019, equation 4)."""
    torch.manual_seed(0)
    norm, x = layers.RMSNorm(24, eps=1e-3), torch.randn(shape).mul(0.1).bfloat16().requires_grad_()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    assert x.dtype == torch.bfloat16
    double, weight = x.detach().double().requires_grad_(), norm.weight.detach().bfloat16().double().requires_grad_()
    exact = double / (double.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * weight
    got, grad = norm(x), torch.randn(shape).bfloat16()
    assert got.dtype == torch.bfloat16
    want = (exact, *torch.autograd.grad(exact, (double, weight), grad.double()))
    for ours, theirs in zip((got, *torch.autograd.grad(got, (x, norm.weight), grad)), want, strict=True):
        assert (ours.double() - theirs).norm() <= 0.01 * theirs.norm()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_a_small_matmul_compiled(rows):
    """In bf16: the sum keeps more digits than a matmul of that type guarantees."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, rows, 24).bfloat16(), torch.randn(2, 3, 24, 5).bfloat16()
    exact = a.double() @ b.double()
    got = torch.compile(layers.matmul)(a, b)
    assert got.dtype == torch.bfloat16 and (got.double() - exact).norm() < 0.005 * exact.norm()
