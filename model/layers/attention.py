"""Softmax attention, its masks, and the cache of its keys and values."""

import torch
import torch.nn.functional as F

from model.kernels import dispatch
from model.kernels.attention import faster_attention, faster_attention_mask, faster_packed_mask
from model.kernels.matmul import faster_matmul


@dispatch(faster_attention)
def attention(q, k, v, mask=None, scale=None):
    """Softmax attention with grouped heads. q (B, T, H, K), k (B, S, G, K), v (B, S, G, Kv) -> (B, T, H, Kv).

    mask None means causal with S == T; else bool (B, 1, T, S), True = visible. scale defaults to 1 / sqrt(K).
    """
    v_dim = v.shape[-1]
    if v_dim < q.shape[-1]:  # the fused kernels want one head size; zero columns change nothing
        v = F.pad(v, (0, q.shape[-1] - v_dim))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)[..., :v_dim].to(q.dtype)


@dispatch(faster_attention_mask)
def attention_mask(positions, state=None, doc_ids=None):
    """Return the keys that each query sees: None for plain causal attention, else bool (B, 1, T, S), True = visible.

    Built once per forward and shared by all layers. With a state the keys are its first `max_pos + T` slots, and a
    sequence sees those up to its own position. With doc_ids (B, T) only keys of the same document are visible.
    """
    if state is not None and doc_ids is not None:
        raise ValueError("doc_ids and state together are not supported: decode each document as a sequence of its own")
    if state is not None and state.max_pos > 0:
        keys = torch.arange(state.max_pos + positions.shape[1], device=positions.device)
        return (keys <= positions[..., None])[:, None]
    if doc_ids is not None:
        causal = positions[0, :, None] >= positions[0, None, :]  # (T, T)
        return (causal & (doc_ids[:, :, None] == doc_ids[:, None, :]))[:, None]
    return None


@dispatch(faster_packed_mask)
def packed_mask(positions, state=None, doc_ids=None):
    """Return the `attention_mask`, in a form that only `attention` reads: do not compute with it."""
    return attention_mask(positions, state, doc_ids)


def cache_append(state, layer, name, new):
    """Append `new` (B, T, ...) to what each sequence of `state` holds; return all slots in use (B, max_pos + T, ...).

    Slots that a sequence has not reached hold zeros or leftovers: mask them (`attention_mask` does).
    """
    cache = state.layers[layer]
    if name not in cache:
        cache[name] = new.new_zeros(new.shape[0], state.max_len, *new.shape[2:])
        state.rewindable.add(name)
    index = torch.arange(new.shape[0], device=new.device)[:, None]
    cache[name][index, state.positions(new.shape[1])] = new.to(cache[name].dtype)
    return cache[name][:, : state.max_pos + new.shape[1]]


@dispatch(faster_matmul)
def matmul(a, b):
    """a (..., N, D) @ b (..., D, F) -> (..., N, F)."""
    return a @ b
