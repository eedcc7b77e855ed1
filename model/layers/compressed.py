"""Windows of m tokens that become one entry each: which ones are closed, who sees an entry, where a state keeps it.

Windows follow one another from the start of a document, or of the text that a state has read. Shapes: N windows, S
entries.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Windows(NamedTuple):
    """The windows that T new tokens close, up to N per sequence; the others are left open, and no token sees them."""

    last: torch.Tensor  # (B, N) index of the last token among the new ones
    number: torch.Tensor  # (B, N) in the document, from 0 on
    rope: tuple  # cos and sin (B, N, 1, K / 2) of the first token
    visible: torch.Tensor  # (B, T, S) bool: the entries that each token sees, of windows that end with it or earlier


def find_windows(positions, ratio, rotary, state=None, doc_ids=None):
    """Return the `Windows` of `ratio` tokens. positions (1 | B, T), doc_ids (B, T): documents are contiguous.

    With a state the entries are those of `entry_append`, else one for each of the windows.
    """
    n_tokens = positions.shape[1]
    n_windows = -(-n_tokens // ratio)
    t = torch.arange(n_tokens, device=positions.device)
    within = positions  # in the document
    if doc_ids is not None:
        starts = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)
        within = t - (t * starts).cummax(dim=1).values
    closes = (within + 1) % ratio == 0
    index = torch.where(closes, closes.cumsum(dim=1) - 1, n_windows)
    last = t.new_full((len(within), n_windows + 1), n_tokens).scatter_(1, index, t.expand_as(index))[:, :-1]
    at = last.clamp(max=n_tokens - 1)
    number = within.gather(1, at) // ratio
    rope = rotary((positions.expand_as(within).gather(1, at) - ratio + 1).clamp(min=0))
    if state is not None:
        slots = torch.arange(_slots(state.max_pos + n_tokens, ratio), device=positions.device)
        return Windows(last, number, rope, (slots + 1) * ratio <= positions[..., None] + 1)
    visible = last[:, None] <= t[:, None]
    if doc_ids is not None:
        visible = visible & (doc_ids.gather(1, at)[:, None] == doc_ids[..., None])
    return Windows(last, number, rope, visible)


def entry_append(state, layer, name, new, windows, ratio):
    """Keep the entries `new` (B, N, ...) of `windows` in slots position // ratio; return all in use (B, S, ...).

    Without a state (None) the new ones are all. The entry of an open window is written too, and again when the window
    is closed; so an entry rewinds when that does which it is made of.
    """
    if state is None:
        return new
    held = state.layers[layer]
    if name not in held:
        held[name] = new.new_zeros(len(new), _slots(state.max_len, ratio) + 1, *new.shape[2:])  # never all in use
        state.rewindable.add(name)
    held[name][torch.arange(len(new), device=new.device)[:, None], windows.number] = new.to(held[name].dtype)
    return held[name][:, : windows.visible.shape[-1]]


def _slots(n_tokens, ratio):
    """The slots for the entries of so many tokens, and one more: a size of 1 would be a compiled graph of its own."""
    return -(-n_tokens // ratio) + 1
