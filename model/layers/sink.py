"""Softmax attention with a sink per head (gpt-oss model card, arXiv 2508.10925, section 2)."""

import torch

from model.kernels import dispatch
from model.kernels.attention import faster_sink_attention


@dispatch(faster_sink_attention)
def sink_attention(q, k, v, sink, mask=None, scale=None):
    """As `attention`, but one more score per head, `sink` (H,), is in the denominator of the softmax only.

    q (B, T, H, K), k (B, S, G, K), v (B, S, G, Kv) -> (B, T, H, Kv); mask and scale as for `attention`.
    """
    per_group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(per_group, dim=2) for x in (k, v))  # (B, S, H, K)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    sink = sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    probs = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]  # (B, H, T, S), their sum below 1
    return torch.einsum("bhts,bshk->bthk", probs.to(v.dtype), v)


@torch.no_grad()
def sink_attention_sums(q, k, sink, mask, scale=None):
    """Return the probabilities of `sink_attention` summed over the query heads, (B, T, S) in fp32, without gradient."""
    per_group = q.shape[2] // k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    total = 0.0
    with torch.autocast(q.device.type, enabled=False):
        for h in range(q.shape[2]):  # one after another, for memory
            keys = k[:, :, h // per_group].to(dtype)
            scores = q[:, :, h].to(dtype) @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
            scores = scores.masked_fill(~mask[:, 0], float("-inf"))
            log_z = torch.logaddexp(scores.logsumexp(dim=-1, keepdim=True), sink[h].to(dtype))
            total = total + (scores - log_z).exp()
    return total
