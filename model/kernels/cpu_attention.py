"""Attention of training on a CPU: batched matmuls, a block of queries at a time, over the keys that it may see.

PyTorch's fused kernel for CPUs takes 1.5 to 3 times as long for sequences of this length. Shapes: B batch, T queries,
S keys, H heads, G kv heads, K head dim; the H / G heads of a kv head are adjacent.
"""

from functools import reduce

import torch
import torch.nn.functional as F

LONGEST = 512  # keys; the probabilities are kept for the backward pass, so memory grows with the square
BLOCK = 64  # queries


def blocked_attention(q, k, v, mask, scale, sink=None):
    """Softmax attention, differentiable once. q (B, T, H, K), k (B, S, G, K), v (B, S, G, Kv) -> (B, T, H, Kv).

    mask None means causal with S == T; else bool (B | 1, 1, T, S), True = visible. sink (H,): as in `sink_attention`.
    """
    n_queries = q.shape[1]
    n_keys = k.shape[1]
    stops = keys_per_block(mask, n_queries, n_keys)
    if mask is None:
        mask = torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    if sink is not None:  # one more key, the first: its value is zero, and its score is the sink
        k, v = (F.pad(x, (0, 0, 0, 0, 1, 0)) for x in (k, v))
        bias = F.pad(bias, (1, 0))
        stops = [stop + 1 for stop in stops]
    return _BlockedAttention.apply(q, k, v, sink, bias[:, :, :, None], scale, stops)


def keys_per_block(mask, n_queries, n_keys):
    """Return for each block of queries the number of first keys that holds every key visible to it, at least 1."""
    starts = range(0, n_queries, BLOCK)
    if mask is None:
        return [min(start + BLOCK, n_queries) for start in starts]
    if torch.compiler.is_compiling():  # the mask's values are unknown at trace time
        return [n_keys for _ in starts]
    seen = mask.view(torch.uint8).amax(dim=(0, 1))  # (T, S); `any` is not vectorized
    last = (seen * torch.arange(1, n_keys + 1)).amax(dim=1)  # (T,)
    return [max(1, int(block.amax())) for block in last.split(BLOCK)]


class _BlockedAttention(torch.autograd.Function):
    """bias (B | 1, 1, T, 1, S) is 0 or -inf; stops: the number of keys of each block of queries.

    sink (H,) or None: the scores of the first key.
    """

    @staticmethod
    def forward(ctx, q, k, v, sink, bias, scale, stops):
        groups = k.shape[2]
        per_group = q.shape[2] // groups
        q, k, v = (_by_group(x, groups) for x in (q, k, v))  # (B * G, T * H / G, K), (B * G, S, K)
        out = []
        probs = []
        for i, (_, block) in enumerate(_blocks(q, per_group)):
            scores = torch.bmm(block, k[:, : stops[i]].mT)
            block_bias = bias[:, :, i * BLOCK : (i + 1) * BLOCK, :, : stops[i]]
            by_query = scores.view(-1, groups, *block_bias.shape[2:3], per_group, stops[i])
            by_query = torch.add(block_bias, by_query, alpha=scale)
            if sink is not None:
                by_query[..., 0] = sink.view(groups, 1, per_group)
            probs.append(by_query.softmax(dim=-1).view_as(scores))
            out.append(torch.bmm(probs[i], v[:, : stops[i]]))
        ctx.save_for_backward(q, k, v, *probs)
        ctx.groups = groups
        ctx.per_group = per_group
        ctx.scale = scale
        ctx.stops = stops
        ctx.has_sink = sink is not None
        # under autocast the matmuls of fp32 inputs are in its dtype
        return _by_head(torch.cat(out, dim=1).to(q.dtype), groups, per_group)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *probs = ctx.saved_tensors
        grad = _by_group(grad, ctx.groups)
        grad_q = []
        grad_k = _PrefixSum(k)
        grad_v = _PrefixSum(v)
        grad_sink = []
        for i, (queries, block) in enumerate(_blocks(q, ctx.per_group)):
            keys = slice(ctx.stops[i])
            p = probs[i]
            grad_probs = torch.bmm(grad[:, queries], v[:, keys].mT)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, p, -1, p.dtype)
            if ctx.has_sink:
                by_head = grad_scores[..., 0].view(-1, ctx.groups, grad_scores.shape[1] // ctx.per_group, ctx.per_group)
                grad_sink.append(by_head.sum(dim=(0, 2), dtype=torch.float32).flatten())
            grad_q.append(torch.bmm(grad_scores, k[:, keys]))
            grad_k.add(torch.bmm(grad_scores.mT, block))
            grad_v.add(torch.bmm(p.mT, grad[:, queries]))
        grad_q = torch.cat(grad_q, dim=1).mul_(ctx.scale)
        grad_k = grad_k.total().mul_(ctx.scale)
        by_key = (_by_head(grad, ctx.groups) for grad in (grad_k, grad_v.total()))
        grad_sink = sum(grad_sink) if ctx.has_sink else None
        return _by_head(grad_q, ctx.groups, ctx.per_group), *by_key, grad_sink, None, None, None


def _blocks(q, per_group):
    """Yield each block of queries of q (B * G, T * H / G, K), as a slice and as a tensor."""
    for start in range(0, q.shape[1], BLOCK * per_group):
        queries = slice(start, start + BLOCK * per_group)
        yield queries, q[:, queries]


class _PrefixSum:
    """The sum of tensors (B * G, stop, K), each of the first keys of `like` (B * G, S, K).

    One of them has S keys in a compiled graph: the last block of causal attention, and with a mask every block.
    """

    def __init__(self, like):
        self.parts = []
        self.sum = None if torch.compiler.is_compiling() else torch.zeros_like(like)

    def add(self, part):
        if self.sum is None:
            self.parts.append(part)
        else:
            self.sum[:, : part.shape[1]] += part

    def total(self):
        """Return the sum (B * G, S, K).

        Under torch.compile, in-place adds to slices become a chain of selections per element, which takes longer than
        the matmuls. So the segments between the stops are summed one by one and concatenated.
        """
        if self.sum is not None:
            return self.sum
        segments = []
        start = 0
        for stop in sorted({part.shape[1] for part in self.parts}):
            segments.append(reduce(torch.add, [part[:, start:stop] for part in self.parts if part.shape[1] >= stop]))
            start = stop
        return torch.cat(segments, dim=1)


def _by_group(x, groups):
    """(B, T, H, K) -> (B * G, T * H / G, K): one matrix per kv head, the heads of a query one after another."""
    return x.unflatten(2, (groups, -1)).transpose(1, 2).reshape(x.shape[0] * groups, -1, x.shape[-1])


def _by_head(x, groups, per_group=1):
    """The inverse of `_by_group`."""
    return x.view(-1, groups, x.shape[1] // per_group, per_group, x.shape[-1]).transpose(1, 2).flatten(2, 3)
