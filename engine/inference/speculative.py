"""Speculative decoding: drafted tokens are verified together with the last one, and accepted where they are right.

A drafted token is right if it is the token that the model samples there anyway, with the request's own settings and
random numbers. So the answer is token for token the one without speculation, greedy or sampled, and only the number of
forward passes differs. (For a draft of probability 1, the rule of Leviathan et al. 2023, section 2.3, accepts with the
same probability p(draft), and the token after a rejected one has the same distribution.)
"""

from typing import Protocol

import torch

from engine.inference.batch import CachedBatch, DecodeStep
from engine.inference.options import check_speculative_name
from engine.inference.request import Request
from engine.inference.scheduler import Scheduler, sample_batch
from model.basemodel import BaseModel, State
from utils.errors import UserError

Tensors = dict[str, torch.Tensor]
NGRAM = (3, 2)  # tokens that must match, the longer first
NGRAM_DRAFTED = 6  # tokens that are copied from behind the match


def check_speculative(model: BaseModel, kind: str) -> None:
    """Raise UserError for an unknown `kind`, or one that the model does not support."""
    check_speculative_name(kind)
    if not model.accepts("state"):
        raise UserError(
            f"--speculative={kind} needs a model whose forward takes `state`, and {model.model_name} does "
            "not: leave it out"
        )
    if kind == "draft" and model.draft is None:
        raise UserError(
            f"--speculative=draft needs a model with a module that drafts, and this {model.model_name} has "
            "none: use --speculative=ngram, or train one with such a module"
        )


class Proposer(Protocol):
    """Drafts the tokens that may come next."""

    def reset(self, max_len: int) -> None:
        """Forget the sequence: another one begins, of up to `max_len` tokens."""

    def observe(self, hidden: torch.Tensor | None, start: int) -> None:
        """Take the `state.hidden` (1, T, D) of the tokens from position `start` on, which are final."""

    def propose(self, ids: list[int]) -> list[int]:
        """Return drafted tokens after `ids`, prompt and answer so far."""


class SpeculativeScheduler(Scheduler):
    """A scheduler with one slot whose step verifies drafted tokens: one forward pass may give several tokens.

    Counts `forward_passes`, `drafted` and `accepted` of a request.
    """

    batch: CachedBatch

    def __init__(
        self,
        model: BaseModel,
        kind: str,
        max_len: int | None = None,
        max_queue: int | None = None,
        decode_step: DecodeStep | None = None,
    ) -> None:
        """kind: "draft" or "ngram"; UserError for a model that cannot. The rest as in `Scheduler`."""
        check_speculative(model, kind)
        super().__init__(model, 1, max_len, max_queue, decode_step)
        self.proposer: Proposer = DraftProposer(model, self.batch.state.max_len) if kind == "draft" else NgramProposer()

    def _decode(self) -> list[Request]:
        if not self.running:
            for request in self._admit():
                self.prefilled_tokens += len(request.ids) - request.cached_tokens
        if not self.running:
            return []
        request = self.running[0]
        start = len(self.slots[0].ids)
        pending = [*request.ids, *request.tokens][start:]
        drafted = self._propose(request)[: max(0, self.batch.state.room - len(pending))]
        before = not_rewindable(self.batch.state) if drafted else []
        logits = self._verify(pending, drafted)
        hidden = self.batch.state.hidden
        n_accepted = self._accept(request, drafted, logits)
        self._keep(pending, drafted, n_accepted, before)
        self.proposer.observe(None if hidden is None else hidden[:, : len(pending) + n_accepted], start)
        self._retire()
        return [request]

    def _propose(self, request: Request) -> list[int]:
        """Return drafted tokens, fewer than the answer has left; none before the first token of the answer."""
        if not request.tokens:
            return []
        drafted = self.proposer.propose([*request.ids, *request.tokens])
        return drafted[: request.limit - len(request.tokens) - 1]

    def _verify(self, pending: list[int], drafted: list[int]) -> torch.Tensor:
        """Read the tokens that the state lacks and the drafted ones: logits of the last pending and the drafted."""
        state = self.batch.state
        state.max_pos = len(self.slots[0].ids)
        state.last_only = not drafted
        ids = torch.tensor([pending + drafted], device=self.device)
        logits = self.batch.forward(ids, state)[0]  # (1|T, V)
        state.advance(len(pending) + len(drafted))
        return logits[-1 - len(drafted) :]

    def _accept(self, request: Request, drafted: list[int], logits: torch.Tensor) -> int:
        """Sample up to the first token that differs from the drafted one; returns how many were right."""
        n_before = len(request.tokens)
        for draft, row in zip([*drafted, None], logits, strict=True):
            sample_batch([request], row[None])
            if request.finish is not None or request.tokens[-1] != draft:
                break
        n_accepted = sum(draft == token for draft, token in zip(drafted, request.tokens[n_before:]))
        request.forward_passes += 1
        request.drafted += len(drafted)
        request.accepted += n_accepted
        return n_accepted

    def _keep(self, pending: list[int], drafted: list[int], n_accepted: int, before: list[Tensors]) -> None:
        """Take rejected tokens out of the state.

        By rewinding; where `before` holds tensors that cannot be rewound, with these, and all is read again.
        """
        slot = self.slots[0]
        state = self.batch.state
        n_rejected = len(drafted) - n_accepted
        if n_rejected and any(before):
            state.rewind(len(pending) + len(drafted))
            for held, copies in zip([*state.layers, state.model], before, strict=True):
                held.update(copies)
            return
        if n_rejected:
            state.rewind(n_rejected)
        slot.ids = slot.ids + pending + drafted[:n_accepted]

    def _clear(self, index: int, n_tokens: int) -> None:
        super()._clear(index, n_tokens)
        self.proposer.reset(self.batch.state.max_len)


def not_rewindable(state: State) -> list[Tensors]:
    """Return copies of the tensors of a state that rewinding leaves as they are: a dict per layer, then the model's."""
    held = [*state.layers, state.model]
    return [{name: x.clone() for name, x in tensors.items() if name not in state.rewindable} for tensors in held]


class DraftProposer:
    """The likeliest token of the model's own `draft` (DeepSeek-V3, section 2.2.3), with a state of its own."""

    def __init__(self, model: BaseModel, max_len: int) -> None:
        self.model = model
        self.reset(max_len)

    def reset(self, max_len: int) -> None:
        self.state = self.model.init_state(1, max_len)
        self.state.last_only = True
        self._hidden: torch.Tensor | None = None  # of the positions that the state has not read

    def observe(self, hidden: torch.Tensor | None, start: int) -> None:
        assert hidden is not None, "a model that drafts leaves state.hidden"
        n_read = self.state.max_pos
        if start > n_read:
            assert self._hidden is not None
            self._hidden = torch.cat([self._hidden[:, : start - n_read], hidden], dim=1)
        else:
            self._hidden = hidden[:, n_read - start :]

    def propose(self, ids: list[int]) -> list[int]:
        # Position i is read together with token i + 1: final tokens only, so this state is never rewound.
        assert self._hidden is not None
        next_ids = torch.tensor([ids[self.state.max_pos + 1 :]], device=self._hidden.device)
        assert self.model.draft is not None
        logits = self.model.draft(self._hidden, next_ids, self.state)[0]
        self.state.advance(next_ids.shape[1])
        self._hidden = None
        return [logits[0, -1].argmax().item()]


class NgramProposer:
    """Copies what followed the last occurrence of the latest tokens: fast for models that quote the prompt."""

    def reset(self, max_len: int) -> None:
        pass

    def observe(self, hidden: torch.Tensor | None, start: int) -> None:
        pass

    def propose(self, ids: list[int]) -> list[int]:
        return prompt_lookup(ids)


def prompt_lookup(ids: list[int]) -> list[int]:
    """Return the tokens behind the last earlier occurrence of the n-gram that `ids` ends with, [] if there is none."""
    for n in NGRAM:
        ngram = ids[-n:]
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ngram:
                return ids[start + n : start + n + NGRAM_DRAFTED]
    return []
