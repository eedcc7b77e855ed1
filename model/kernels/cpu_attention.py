"""Attention of training on a processor: plain products, a block of queries at a time, over the keys that it may see.

PyTorch's fused kernel for CPUs takes 1.5 to 3 times as long for rows of this length. Shapes as in layers.py: B batch,
T queries, S keys, H heads, G kv heads, K head dim; the H / G heads of a group lie side by side behind each query.
"""

from functools import reduce

import torch

LONGEST = 512  # keys; the probabilities are kept for the backward pass, and their number grows with the square
BLOCK = 64  # queries


def blocked_attention(q, k, v, mask, scale):
    """Softmax attention, differentiable once. q (B, T, H, K), k (B, S, G, K), v (B, S, G, Kv) -> (B, T, H, Kv).

    mask None means causal with S == T; else bool (B | 1, 1, T, S), True = visible.
    """
    n_queries, n_keys = q.shape[1], k.shape[1]
    stops = visible_keys(mask, n_queries, n_keys)
    if mask is None:
        mask = torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    return _BlockedAttention.apply(q, k, v, bias[:, :, :, None], scale, stops)


def visible_keys(mask, n_queries, n_keys):
    """Return for each block of queries how many of the first keys it needs: behind them nobody in it sees any."""
    starts = range(0, n_queries, BLOCK)
    if mask is None:
        return [min(start + BLOCK, n_queries) for start in starts]
    if torch.compiler.is_compiling():  # a program knows no mask
        return [n_keys for _ in starts]
    seen = mask.view(torch.uint8).amax(dim=(0, 1))  # (T, S); `any` is not vectorized
    last = (seen * torch.arange(1, n_keys + 1)).amax(dim=1)  # (T,)
    return [max(1, int(block.amax())) for block in last.split(BLOCK)]


class _BlockedAttention(torch.autograd.Function):
    """bias (B | 1, 1, T, 1, S) is 0 or -inf; stops: the keys of each block of queries."""

    @staticmethod
    def forward(ctx, q, k, v, bias, scale, stops):
        groups, per_group = k.shape[2], q.shape[2] // k.shape[2]
        q, k, v = (_by_group(x, groups) for x in (q, k, v))  # (B * G, T * H / G, K), (B * G, S, K)
        out, probs = [], []
        for i, (_, block) in enumerate(_blocks(q, per_group)):
            scores = torch.bmm(block, k[:, : stops[i]].mT)
            hidden = bias[:, :, i * BLOCK : (i + 1) * BLOCK, :, : stops[i]]
            by_query = scores.view(-1, groups, *hidden.shape[2:3], per_group, stops[i])
            probs.append(torch.add(hidden, by_query, alpha=scale).softmax(dim=-1).view_as(scores))
            out.append(torch.bmm(probs[i], v[:, : stops[i]]))
        ctx.save_for_backward(q, k, v, *probs)
        ctx.groups, ctx.per_group, ctx.scale, ctx.stops = groups, per_group, scale, stops
        # under autocast fp32 products are of its type
        return _by_head(torch.cat(out, dim=1).to(q.dtype), groups, per_group)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *probs = ctx.saved_tensors
        grad = _by_group(grad, ctx.groups)
        grad_q, grad_k, grad_v = [], _Sum(k), _Sum(v)
        for i, (rows, block) in enumerate(_blocks(q, ctx.per_group)):
            keys, p = slice(ctx.stops[i]), probs[i]
            grad_probs = torch.bmm(grad[:, rows], v[:, keys].mT)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, p, -1, p.dtype)
            grad_q.append(torch.bmm(grad_scores, k[:, keys]))
            grad_k.add(torch.bmm(grad_scores.mT, block))
            grad_v.add(torch.bmm(p.mT, grad[:, rows]))
        grad_q, grad_k = torch.cat(grad_q, dim=1).mul_(ctx.scale), grad_k.total().mul_(ctx.scale)
        by_key = (_by_head(grad, ctx.groups) for grad in (grad_k, grad_v.total()))
        return _by_head(grad_q, ctx.groups, ctx.per_group), *by_key, None, None, None


def _blocks(q, per_group):
    """Yield the rows of each block of queries of q (B * G, T * H / G, K), as a slice and taken out."""
    for start in range(0, q.shape[1], BLOCK * per_group):
        rows = slice(start, start + BLOCK * per_group)
        yield rows, q[:, rows]


class _Sum:
    """The sum of parts (B * G, stop, K), each of the first keys of `like` (B * G, S, K). Compiled, one has
    them all: the last block of causal attention, and with a mask every block."""

    def __init__(self, like):
        self.parts = []
        self.sum = None if torch.compiler.is_compiling() else torch.zeros_like(like)

    def add(self, part):
        if self.sum is None:
            self.parts.append(part)
        else:
            self.sum[:, : part.shape[1]] += part

    def total(self):
        """Compiled, of what is added in place to first rows every number asks anew which parts it is made of, and that
        takes longer than the products: so they are added up here, from one stop to the next."""
        if self.sum is not None:
            return self.sum
        pieces, start = [], 0
        for stop in sorted({part.shape[1] for part in self.parts}):
            pieces.append(reduce(torch.add, [part[:, start:stop] for part in self.parts if part.shape[1] >= stop]))
            start = stop
        return torch.cat(pieces, dim=1)


def _by_group(x, groups):
    """(B, T, H, K) -> (B * G, T * H / G, K): one matrix for each group, the heads of a query one after the other."""
    return x.unflatten(2, (groups, -1)).transpose(1, 2).reshape(x.shape[0] * groups, -1, x.shape[-1])


def _by_head(x, groups, per_group=1):
    """The way back from `_by_group`."""
    return x.view(-1, groups, x.shape[1] // per_group, per_group, x.shape[-1]).transpose(1, 2).flatten(2, 3)
