"""Experts of any form. Shapes: N tokens, D dim, E experts, A active experts per token, F outputs of a matrix."""

import torch
import torch.nn.functional as F

from model.kernels import dispatch
from model.kernels.experts import faster_expert_linear, faster_experts


@dispatch(faster_experts)
def experts(x, chosen, weight, expert, n_experts):
    """Run each token through its chosen experts and sum the results by their weights.

    x (N, D), chosen and weight (N, A) -> (N, D). `expert(x (n, D), e)` -> (n, D) computes one expert of several tokens:
    e is its number, or the experts of all tokens, so that it goes to `expert_linear` and nowhere else.
    """
    out = torch.zeros_like(x)
    for e in chosen.unique().tolist():
        token, slot = (chosen == e).nonzero(as_tuple=True)  # the tokens that chose it
        result = expert(x[token], e) * weight[token, slot, None]
        out.index_add_(0, token, result.to(out.dtype))
    return out


@dispatch(faster_expert_linear)
def expert_linear(x, stack, e, bias=None):
    """x (n, D) times the matrix of its expert `e` in a stack (E, F, D), plus its row of `bias` (E, F) -> (n, F)."""
    return F.linear(x, stack[e], None if bias is None else bias[e])
