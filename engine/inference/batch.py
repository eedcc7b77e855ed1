"""The sequences of a running batch: their state in the model, or their tokens, read again in every step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from engine.inference.threads import StepThreads
from model.basemodel import BaseModel, State

DecodeStep = Callable[[torch.Tensor, State], torch.Tensor]  # ids (B, T), state -> logits (B, 1|T, V)


def open_batch(
    model: BaseModel, n_slots: int, max_len: int, decode_step: DecodeStep | None = None
) -> "CachedBatch | RecomputeBatch":
    """Return `n_slots` empty slots for `max_len` tokens each: cached, if the model's forward takes a state."""
    if model.accepts("state"):
        return CachedBatch(model, n_slots, max_len, decode_step)
    return RecomputeBatch(model, n_slots, max_len)


FIRST_LENGTH = 4096  # tokens that a single slot has room for at first


class CachedBatch:
    """Slots of one `State`: each token is read once.

    A single slot is as long as its text needs, in powers of two: max_seq_len may be far more than memory allows.
    """

    def __init__(self, model: BaseModel, n_slots: int, max_len: int, decode_step: DecodeStep | None = None) -> None:
        self.model = model
        self.decode_step = decode_step
        self.max_len = max_len
        self.threads = StepThreads(model)
        self.state = model.init_state(n_slots, max_len if n_slots > 1 else min(max_len, FIRST_LENGTH))
        self._empty = model.init_state(1, max_len)

    def has_room(self, n_tokens: int) -> bool:
        """Return whether a text of `n_tokens`, prompt and answer, fits the slots as they are."""
        return n_tokens <= self.state.max_len

    def clear(self, slot: int, n_tokens: int) -> None:
        """Empty a slot for a text of `n_tokens`.

        All of it is overwritten: even behind a mask, a non-finite key spoils the attention.
        """
        if len(self.state.pos) > 1:
            self.state.overwrite([slot], self._empty)
            return
        length = FIRST_LENGTH
        while length < n_tokens:
            length *= 2
        self.state = self.model.init_state(1, min(length, self.max_len))

    def swap(self, a: int, b: int) -> None:
        self.state.overwrite([a, b], self.state.select([b, a]))

    def forward(self, ids: torch.Tensor, state: State) -> Any:
        """Return the logits (B, 1|T, V) of one forward pass; `decode_step` replaces the plain forward of the model."""
        with self.threads.running(ids.numel()):
            return self.model(ids, state=state)[0] if self.decode_step is None else self.decode_step(ids, state)

    def append(self, first: int, lengths: list[int], ids: torch.Tensor, all_logits: bool = False) -> torch.Tensor:
        """Append `ids` (B, T) to the slots from `first` on, which hold `lengths` tokens.

        Returns the last logits (B, V) or, with `all_logits`, those of every new token (B, T, V).

        A slice of slots is a set of views, which the model updates in place. A tensor that a layer replaces instead,
        as a recurrence may, is copied back.
        """
        state = self.state
        slots = slice(first, first + len(ids))
        if len(ids) == len(state.pos):  # all slots: no views needed
            state.max_pos = max(lengths)
            state.last_only = not all_logits
            logits = self.forward(ids, state)
            state.advance(ids.shape[1])
            return logits if all_logits else logits[:, -1]
        *layers, of_model = [
            {name: tensor[slots] for name, tensor in held.items()} for held in [*state.layers, state.model]
        ]
        views = [dict(view) for view in [*layers, of_model]]
        part = replace(
            state, pos=state.pos[slots], layers=layers, model=of_model, max_pos=max(lengths), last_only=not all_logits
        )
        logits = self.forward(ids, part)
        part.advance(ids.shape[1])
        state.pos[slots] = part.pos
        for held, view, new in zip([*state.layers, state.model], views, [*part.layers, part.model], strict=True):
            for name, tensor in new.items():
                if tensor is not view.get(name):
                    if name not in held:
                        held[name] = tensor.new_full((len(state.pos), *tensor.shape[1:]), state.empty.get(name, 0))
                    held[name][slots] = tensor
        return logits if all_logits else logits[:, -1]


class RecomputeBatch:
    """The tokens themselves: every step runs the plain forward over all of them. Slow, and works for every model.

    Shorter sequences are padded on the right, where a causal model does not look.
    """

    def __init__(self, model: BaseModel, n_slots: int, max_len: int) -> None:
        self.model = model
        self.max_len = max_len
        self.threads = StepThreads(model)
        self.ids = torch.zeros(n_slots, max_len, dtype=torch.long, device=next(model.parameters()).device)

    def has_room(self, n_tokens: int) -> bool:
        return n_tokens <= self.ids.shape[1]

    def clear(self, slot: int, n_tokens: int) -> None:
        """Do nothing: leftover tokens are overwritten before they are read."""

    def swap(self, a: int, b: int) -> None:
        self.ids[[a, b]] = self.ids[[b, a]]

    def append(self, first: int, lengths: list[int], ids: torch.Tensor, all_logits: bool = False) -> torch.Tensor:
        """Append `ids` (B, T) as `CachedBatch.append` does."""
        texts = self.ids[first : first + len(ids)]
        device = ids.device
        at = torch.tensor(lengths, device=device)[:, None] + torch.arange(ids.shape[1], device=device)  # (B, T)
        texts.scatter_(1, at, ids)
        read = texts[:, : max(lengths) + ids.shape[1]]
        with self.threads.running(read.numel()):
            logits = self.model(read)[0]  # (B, T, V)
        logits = logits[torch.arange(len(ids), device=device)[:, None], at if all_logits else at[:, -1:]]
        return logits if all_logits else logits[:, -1]
