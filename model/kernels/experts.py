"""Which form of experts of any kind runs: one expert per row for few tokens, all experts compiled, sorted tokens.

Shapes: N tokens, D dim, E experts, A active experts per token, F outputs of a matrix.
"""

import torch

from model.kernels.int8 import Int8Weight
from model.kernels.moe import FEW_TOKENS_COMPILED, FEW_TOKENS_EAGER, mix, permute_rows
from model.kernels.packed import Packed


def faster_experts(plain, x, chosen, weight, expert, n_experts):
    """Choose a form by the number of tokens, and whether a graph is compiled, in which no size depends on values."""
    compiling = torch.compiler.is_compiling()
    active = chosen.shape[1]
    if not torch.is_grad_enabled() and len(x) <= (FEW_TOKENS_COMPILED if compiling else FEW_TOKENS_EAGER):
        rows = x.repeat_interleave(active, dim=0)  # (N * A, D)
        if compiling or not x.is_cpu:  # no size and no number of an expert is read
            results = expert(rows, chosen.flatten())
        else:
            results = torch.cat([expert(row, e) for row, e in zip(rows.split(1), chosen.flatten().tolist())])
        return mix(results.unflatten(0, chosen.shape), weight).to(x.dtype)
    if compiling:  # every expert works on every token: E / A times the arithmetic
        out = 0
        for e in range(n_experts):
            share = ((chosen == e) * weight).sum(dim=1, keepdim=True)  # (N, 1)
            result = expert(x, e)
            out = out + result * share.to(result.dtype)
        return out.to(x.dtype)
    counts = (chosen[..., None] == torch.arange(n_experts, device=chosen.device)).sum(dim=(0, 1))
    order = chosen.flatten().argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    rows = permute_rows(x, order, inverse, active)  # (N * A, D), by expert
    results = [expert(part, e) for e, part in enumerate(rows.split(counts.tolist())) if len(part)]
    return mix(permute_rows(torch.cat(results), inverse, order).unflatten(0, chosen.shape), weight).to(x.dtype)


def faster_expert_linear(plain, x, stack, e):
    """Stacks that are packed or int8; for an expert per token a sum that the compiler fuses with the lookup."""
    if isinstance(stack, Packed) or isinstance(stack, Int8Weight) and isinstance(e, int):
        return stack.linear(x, e)
    if isinstance(e, int):
        return plain(x, stack, e)
    is_int8 = isinstance(stack, Int8Weight)
    weight = stack.q if is_int8 else stack
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = (weight[e].to(dtype) * x[:, None].to(dtype)).sum(dim=-1)
    return (out * stack.scale[e] if is_int8 else out).to(x.dtype)
