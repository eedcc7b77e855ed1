"""Sliding windows: a layer that sees the last tokens only keeps no others of a sequence.

They are in a ring: position p in slot p % C of C slots, so that a new token takes the place of the oldest. C is the
window and `state.room` more, whatever the length of the state: so many tokens can be rewound, or read together with the
next one, before one that is still visible has been overwritten. Shapes: W window, S keys.
"""

import torch

from model.kernels import dispatch
from model.kernels.attention import faster_packed_window_mask
from model.layers.attention import attention_mask, cache_append


def window_append(state, layer, name, new, window=None):
    """Append `new` (B, T, ...) to the last tokens that each sequence of `state` holds; return the keys to attend to.

    Which they are, and in which order, only `window_mask` knows. window None: all are kept, `cache_append`.
    """
    if window is None:
        return cache_append(state, layer, name, new)
    if state.max_pos > 0 and not _fits_ring(state, new.shape[1]):
        return recent(state, layer, name, new, window - 1)
    ring = _ring(state, layer, name, new, window)
    _write(ring, state, new)
    return ring if state.max_pos > 0 else new


def window_mask(positions, state=None, doc_ids=None, window=None):
    """Return the `attention_mask` for the keys of `window_append`: a query sees the last `window` tokens, itself one.

    None for plain causal attention, else bool (B | 1, 1, T, S), True = visible.
    """
    n_tokens = positions.shape[1]
    if window is None or (state is None or state.max_pos == 0) and n_tokens <= window:
        return attention_mask(positions, state, doc_ids)
    if state is None or state.max_pos == 0:
        age = positions[0, :, None] - positions[0]  # (T, T), of a key when it is read
        near = ((age >= 0) & (age < window))[None, None]
        mask = attention_mask(positions, state, doc_ids)
        return near if mask is None else near & mask
    if doc_ids is not None:
        return attention_mask(positions, state, doc_ids)  # refuses
    pos = positions[:, :1]
    if _fits_ring(state, n_tokens):
        size = window + state.room
        last = pos + n_tokens - 1
        behind = last % size - torch.arange(size, device=pos.device)  # (B, S), slots
        keys = last - torch.where(behind < 0, behind + size, behind)
    else:
        keys = pos + torch.arange(1 - window, n_tokens, device=pos.device)
    age = positions[..., None] - keys[:, None]  # (B, T, S)
    return ((age >= 0) & (age < window) & (keys >= 0)[:, None])[:, None]


@dispatch(faster_packed_window_mask)
def packed_window_mask(positions, state=None, doc_ids=None, window=None):
    """Return the `window_mask`, in a form that only `attention` and `sink_attention` read: do not compute with it."""
    return window_mask(positions, state, doc_ids, window)


def recent(state, layer, name, new, size):
    """Return the last `size` inputs of each sequence before `new` (B, T, ...), then `new`: (B, size + T, ...).

    Before the start of a sequence there are zeros; so everywhere when `state` is None. layer None: of the full model.
    """
    if state is None:
        return torch.cat((new.new_zeros(new.shape[0], size, *new.shape[2:]), new), dim=1)
    ring = _ring(state, layer, name, new, size + 1)
    new = new.to(ring.dtype)
    positions = state.pos[:, None] + torch.arange(-size, 0, device=new.device)  # (B, size)
    before = ring[torch.arange(new.shape[0], device=new.device)[:, None], positions % ring.shape[1]]
    started = (positions >= 0).view(*positions.shape, *[1] * (new.ndim - 2))
    before = torch.where(started, before, torch.zeros_like(before))
    _write(ring, state, new)
    return torch.cat((before, new), dim=1)


def _fits_ring(state, n_tokens):
    """Whether so many new tokens overwrite none that the first of them sees."""
    return n_tokens <= state.room + 1


def _ring(state, layer, name, new, window):
    held = state.model if layer is None else state.layers[layer]
    if name not in held:
        held[name] = new.new_zeros(new.shape[0], window + state.room, *new.shape[2:])
        state.rewindable.add(name)
    return held[name]


def _write(ring, state, new):
    size = ring.shape[1]
    slots = state.positions(new.shape[1])[:, -size:] % size
    ring[torch.arange(new.shape[0], device=new.device)[:, None], slots] = new[:, -size:].to(ring.dtype)
