"""How tokens come to experts, and a loss for even loads. Shapes: N tokens, E experts, A active ones per token."""

import torch
import torch.nn.functional as F


def token_table(n_ids, n_active, n_experts):
    """Return different experts for every token id at random (n_ids, n_active), every expert as often in each column.

    For hash layers (Roller et al. 2021, "Hash Layers for Large Sparse Models").
    """
    place = torch.randperm(n_ids)  # blocks of n_experts ids, which take the experts from 0 on first
    steps = 1 + torch.rand(n_ids // n_experts + 1, n_experts - 1).argsort(dim=1)
    steps = F.pad(steps, (1, 0))[:, :n_active]  # (blocks, n_active), from the first expert to the others
    return (place[:, None] + steps[place // n_experts]) % n_experts


def choose_experts(score, n_active, n_groups=1, n_limited=1):
    """Return the experts of the largest scores (N, E) as numbers (N, A) (DeepSeek-V3, equation 16 and section 2.1.2).

    Only the experts of the `n_limited` best of `n_groups` groups may be chosen; a group is as good as its best two.
    """
    if n_limited < n_groups:
        groups = score.unflatten(-1, (n_groups, -1))  # (N, groups, E / groups)
        best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(n_limited, dim=-1).indices
        allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
        score = groups.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
    return score.topk(n_active, dim=-1, sorted=False).indices


def balance_loss(affinity, n_active, token_mask=None):
    """Return the sequence-wise balance loss without its weight (DeepSeek-V3, equations 17-20), mean over the sequences.

    affinity (B, T, E) of all experts, token_mask (B, T), False = padding.
    """
    n_experts = affinity.shape[-1]
    top = affinity.detach().topk(n_active, dim=-1, sorted=False).indices  # without the routing bias
    hits = torch.zeros_like(affinity).scatter_(-1, top, 1.0)
    is_token = affinity.new_ones(affinity.shape[:2]) if token_mask is None else token_mask.to(affinity.dtype)
    share = (is_token / is_token.sum(dim=1, keepdim=True).clamp(min=1))[..., None]  # (B, T, 1), the 1 / T
    f = (hits * share).sum(dim=1) * (n_experts / n_active)  # (B, E)
    p = (affinity / affinity.sum(dim=-1, keepdim=True) * share).sum(dim=1)
    return (f * p).sum(dim=-1).mean()
