"""Which form of experts of any kind runs: tokens sorted by expert, for few tokens the expert of each row.

Shapes: N tokens, D dim, E experts, A active experts per token, F outputs of a matrix; n rows, pairs of a token and an
expert.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from model.kernels.cpu_moe import register_operator, slices
from model.kernels.int8 import Int8Weight
from model.kernels.moe import FEW_TOKENS_COMPILED, FEW_TOKENS_EAGER, expert_matmul, has_grouped_mm, mix, permute_rows
from model.kernels.packed import Packed
from model.kernels.precision import compute_dtype


class ExpertOfRow(NamedTuple):
    """An expert per row, in place of the number of one expert."""

    expert: torch.Tensor  # (n,) int64
    counts: torch.Tensor | None  # (E,), the rows of each expert, which are sorted by it; None: in any order


def faster_experts(plain, x, chosen, weight, expert, n_experts):
    """Choose a form by the number of tokens. No size depends on values, so the layer is part of a compiled graph."""
    active = chosen.shape[1]
    few = FEW_TOKENS_COMPILED if torch.compiler.is_compiling() else FEW_TOKENS_EAGER
    if not torch.is_grad_enabled() and len(x) <= few:
        rows = x.repeat_interleave(active, dim=0)  # (N * A, D)
        results = expert(rows, ExpertOfRow(chosen.flatten(), None))
    else:
        counts = (chosen[..., None] == torch.arange(n_experts, device=chosen.device)).sum(dim=(0, 1))
        order = chosen.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows = permute_rows(x, order, inverse, active)
        results = permute_rows(expert(rows, ExpertOfRow(chosen.flatten()[order], counts)), inverse, order)
    return mix(results.unflatten(0, chosen.shape), weight).to(x.dtype)


def faster_expert_linear(plain, x, stack, e, bias=None):
    """Choose a form by how the weights are held."""
    if isinstance(e, int):
        return plain(x, stack, e, bias)
    if isinstance(stack, Packed):
        out = torch.ops.mini_llm.expert_linear(x, e.expert, stack.weight, stack.scale, stack.n_outputs)
    elif e.counts is None:
        out = _rows_times_matrices(x, stack, e.expert)
    elif isinstance(stack, Int8Weight) and not torch.compiler.is_compiling() or has_grouped_mm(x, stack):
        out = expert_matmul(x, stack, e.counts)
    else:
        stack = stack.dequantized() if isinstance(stack, Int8Weight) else stack
        x, stack = (t.to(compute_dtype(x)) for t in (x, stack))
        return torch.ops.mini_llm.segment_linear(x, e.counts, stack, bias)
    return out if bias is None else out + bias[e.expert].to(out.dtype)


def _rows_times_matrices(x, stack, index):
    """x (n, D) times stack[index] -> (n, F): compiled, a sum that is fused with the lookup; on a CPU row by row."""
    is_int8 = isinstance(stack, Int8Weight)
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        dtype = torch.promote_types(x.dtype, torch.float32)
        out = ((stack.q if is_int8 else stack)[index].to(dtype) * x[:, None].to(dtype)).sum(dim=-1)
        return (out * stack.scale[index] if is_int8 else out).to(x.dtype)
    rows = zip(x.split(1), index.tolist())
    return torch.cat([stack.linear(row, e) if is_int8 else F.linear(row, stack[e]) for row, e in rows])


# ---------------------------------------------------------------- one operator to the compiler


def _forward(x, counts, stack, bias):
    out = x.new_empty(len(x), stack.shape[1])
    for e, rows in enumerate(slices(counts)):
        torch.mm(x[rows], stack[e].T, out=out[rows])
        if bias is not None:
            out[rows] += bias[e]
    return out


def _backward(grad, x, counts, stack, has_bias):
    grad = grad.contiguous()
    grad_x = torch.empty_like(x)
    grad_stack = torch.empty_like(stack)
    grad_bias = grad.new_empty(stack.shape[:2], dtype=torch.promote_types(grad.dtype, torch.float32))
    for e, rows in enumerate(slices(counts)):
        torch.mm(grad[rows], stack[e], out=grad_x[rows])
        torch.mm(grad[rows].T, x[rows], out=grad_stack[e])
        if has_bias:
            torch.sum(grad[rows], dim=0, dtype=grad_bias.dtype, out=grad_bias[e])
    return grad_x, grad_stack, grad_bias


def _fake_forward(x, counts, stack, bias):
    return x.new_empty(x.shape[0], stack.shape[1])


def _fake_backward(grad, x, counts, stack, has_bias):
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return x.new_empty(x.shape), stack.new_empty(stack.shape), grad.new_empty(stack.shape[:2], dtype=dtype)


def _setup_context(ctx, inputs, output):
    x, counts, stack, bias = inputs
    ctx.save_for_backward(x, counts, stack)
    ctx.has_bias = bias is not None


def _differentiate(ctx, grad):
    grads = torch.ops.mini_llm.segment_linear_backward(grad, *ctx.saved_tensors, ctx.has_bias)
    return grads[0], None, grads[1], grads[2] if ctx.has_bias else None


def _flops(x, counts, stack, *_, **__):
    """For PyTorch's FLOP counter, which passes shapes and cannot see into an operator."""
    return 2 * x[0] * x[1] * stack[1]


def _backward_flops(grad, *shapes, **__):
    return 2 * _flops(*shapes)


register_operator(
    "segment_linear", "(Tensor x, Tensor counts, Tensor stack, Tensor? bias) -> Tensor", _forward, _fake_forward, _flops
)
register_operator(
    "segment_linear_backward",
    "(Tensor grad, Tensor x, Tensor counts, Tensor stack, bool has_bias) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _backward_flops,
)
torch.library.register_autograd("mini_llm::segment_linear", _differentiate, setup_context=_setup_context)
