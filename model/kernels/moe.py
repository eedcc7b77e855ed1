"""Which form of the routed experts runs: packed weights, a lookup for few tokens, a loop on a CPU, grouped matmuls.

Shapes: N tokens, D dim, E experts, A active experts per token, F ffn width of an expert.
"""

import torch
import torch.nn.functional as F

from model.kernels.cpu_moe import looped_experts, slices
from model.kernels.int8 import Int8Weight
from model.kernels.packed import Packed, packed_experts
from model.kernels.precision import compute_dtype

# Tokens of a decode step up to which the experts are looked up without sorting the tokens.
FEW_TOKENS_EAGER = 2
FEW_TOKENS_COMPILED = 16


def faster_experts(plain, x, chosen, weight, gate, up, down):
    """Choose a form by the device, the number of tokens and how the weights are held."""
    if isinstance(gate, Packed):
        return mix(packed_experts(x, chosen, gate, up, down), weight)
    few = FEW_TOKENS_COMPILED if torch.compiler.is_compiling() else FEW_TOKENS_EAGER
    if not torch.is_grad_enabled() and len(x) <= few:
        h = F.silu(chosen_matmul(x[:, None], gate, chosen)) * chosen_matmul(x[:, None], up, chosen)
        return mix(chosen_matmul(h, down, chosen), weight)
    n_experts = (gate.q if isinstance(gate, Int8Weight) else gate).shape[0]
    counts = (chosen[..., None] == torch.arange(n_experts, device=chosen.device)).sum(dim=(0, 1))
    if not isinstance(gate, Int8Weight) and not has_grouped_mm(x, gate):
        x, gate, up, down = (t.to(compute_dtype(x)) for t in (x, gate, up, down))
        return looped_experts(x, chosen, weight, counts, gate, up, down)
    # Sort the N * A (token, expert) pairs by expert, run each expert on its own segment, and sort back.
    order = chosen.flatten().argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    h = permute_rows(x, order, inverse, chosen.shape[1])  # (N * A, D)
    h = F.silu(expert_matmul(h, gate, counts)) * expert_matmul(h, up, counts)
    return mix(permute_rows(expert_matmul(h, down, counts), inverse, order).unflatten(0, chosen.shape), weight)


def mix(results, weight):
    """Sum of the results of each token's experts (N, A, D) by their weights (N, A)."""
    return (results * weight[..., None].to(results.dtype)).sum(dim=1)


def has_grouped_mm(x, weight):
    """Whether the device multiplies many matrices at once, so that the host need not wait for the counts."""
    fits = not (weight.shape[1] % 8 or weight.shape[2] % 8)  # the kernel requires rows of a multiple of 16 bytes
    return x.is_cuda and compute_dtype(x) == torch.bfloat16 and fits


class _Permute(torch.autograd.Function):
    """x[order // copies]; its gradient is a gather by the inverse, much cheaper than the usual scatter-add."""

    @staticmethod
    def forward(ctx, x, order, inverse, copies):
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[order // copies if copies > 1 else order]

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        grad = grad[inverse]
        if ctx.copies > 1:
            grad = grad.unflatten(0, (-1, ctx.copies)).sum(dim=1)
        return grad, None, None, None


def permute_rows(x, order, inverse, copies=1):
    """Return the rows of x (N, D), each repeated `copies` times, in the order `order`: (N * copies, D).

    order (N * copies,) is a permutation and `inverse` its inverse.
    """
    return _Permute.apply(x, order, inverse, copies)


def expert_matmul(x, weight, counts):
    """Multiply each expert's tokens by its matrix: x (N, D) sorted by expert, weight (E, F, D), counts (E,) -> (N, F).

    For int8 weights, or where `has_grouped_mm`.
    """
    if isinstance(weight, Int8Weight):
        return torch.cat([weight.linear(x[rows], expert) for expert, rows in enumerate(slices(counts))])
    x = x.to(compute_dtype(x))
    weight = weight.to(compute_dtype(x))
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))


def chosen_matmul(x, weight, chosen):
    """Multiply each (token, expert) pair by the expert's matrix, without sorting: for the few tokens of a decode step.

    x (N, A or 1, D), weight (E, F, D), chosen (N, A) -> (N, A, F). Only the weights of the chosen experts are read:
    compiled, in a sum that the compiler fuses with the lookup; eager on a CPU, one matmul after another.
    """
    is_int8 = isinstance(weight, Int8Weight)
    if torch.compiler.is_compiling():
        q = weight.q if is_int8 else weight
        out = (q[chosen].float() * x[:, :, None].float()).sum(dim=-1)
        return (out * weight.scale[chosen] if is_int8 else out).to(x.dtype)
    x = x.expand(-1, chosen.shape[1], -1).flatten(0, 1)
    experts = chosen.flatten().tolist()
    rows = [weight.linear(one, e) if is_int8 else F.linear(one, weight[e]) for one, e in zip(x.split(1), experts)]
    return torch.cat(rows).unflatten(0, chosen.shape)
