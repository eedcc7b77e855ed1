"""Mixture of experts. Shapes: N tokens, D dim, E experts, A active experts per token, F ffn width of an expert."""

import torch
import torch.nn.functional as F

from model.kernels import dispatch
from model.kernels.moe import faster_experts


@dispatch(faster_experts)
def expert_swiglu(x, chosen, weight, gate, up, down):
    """Run each token through its chosen experts, down(silu(gate(x)) * up(x)), and sum the results by their weights.

    x (N, D), chosen and weight (N, A), gate and up (E, F, D), down (E, D, F) -> (N, D).
    """
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        token, slot = (chosen == expert).nonzero(as_tuple=True)  # the tokens that chose it
        h = F.silu(F.linear(x[token], gate[expert])) * F.linear(x[token], up[expert])
        result = F.linear(h, down[expert]) * weight[token, slot, None]
        out.index_add_(0, token, result.to(out.dtype))
    return out


def expert_load(chosen, n_experts, token_mask=None):
    """Count the tokens of each expert, (E,): chosen (N, A); of the tokens in token_mask (B, T) only, B * T = N."""
    hits = chosen[..., None] == torch.arange(n_experts, device=chosen.device)  # (N, A, E); bincount would synchronise
    if token_mask is not None:
        hits = hits & token_mask.flatten()[:, None, None]
    return hits.sum(dim=(0, 1))
