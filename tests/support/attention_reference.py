"""Attention by loops over sequences and queries, in float64."""

import torch

HEADS, GROUPS, K_DIM, V_DIM = 4, 2, 8, 6


def random_attention(batch_size, n_tokens, seed=0, dtype=torch.float64):
    """Return q, k, v and sinks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch_size, n_tokens, HEADS, K_DIM), (batch_size, n_tokens, GROUPS, K_DIM)
    shapes = (*shapes, (batch_size, n_tokens, GROUPS, V_DIM), (HEADS,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def attention_loop(q, k, v, sink=None, window=None, doc_ids=None):
    """Causal attention (B, T, H, Kv), in a window, in each document, with a score per head that no key has."""
    q, k, v = (x.double() for x in (q, k, v))
    per_group = q.shape[2] // k.shape[2]
    out = []
    for row in range(len(q)):
        for t in range(q.shape[1]):
            first = 0 if window is None else max(0, t - window + 1)
            keys = [s for s in range(first, t + 1) if doc_ids is None or doc_ids[row, s] == doc_ids[row, t]]
            for head in range(q.shape[2]):
                scores = k[row, keys, head // per_group] @ q[row, t, head] * q.shape[-1] ** -0.5
                weights = scores.exp()
                total = weights.sum() + (0 if sink is None else sink[head].double().exp())
                out.append(weights @ v[row, keys, head // per_group] / total)
    return torch.stack(out).view(*q.shape[:3], -1)
