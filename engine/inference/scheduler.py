"""Continuous batching: requests enter and leave a running batch at any step, and none depends on the others."""

import math
import threading
from collections import deque
from itertools import groupby

import torch

from engine.inference.batch import DecodeStep, open_batch
from engine.inference.request import Logprobs, Request
from engine.inference.sampling import Sampling, log_probabilities, sample
from model.basemodel import BaseModel
from utils.errors import UserError

MARGIN = 16  # tokens of a slot behind the longest answer, for drafts that are rejected
PREFILL_TOKENS = 4096  # of prompts per step: bounds how long running requests wait for a prefill
SCORED_TOKENS = 512  # of a prompt per forward pass when its log-probabilities are asked for: bounds the logits' memory


class QueueFull(Exception):
    """More requests wait than the scheduler's queue takes."""


class PromptTooLong(UserError):
    """The prompt leaves no room for a token of the answer."""


def max_completion_tokens(model: BaseModel, ids: list[int], max_new_tokens: int, at_least: int = 1) -> int:
    """Return how many tokens may follow the prompt `ids`: the only length check.

    at_least: tokens that must fit behind the prompt; 0 for one that is only read. UserError for an empty prompt, an id
    outside the vocabulary, or fewer max_new_tokens; PromptTooLong for a prompt that fills max_seq_len.
    """
    vocab_size = model.args.vocab_size
    max_seq_len = model.args.max_seq_len
    if not ids:
        raise UserError("the prompt is empty: a model needs at least one token, such as <s>")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UserError(
            f"the prompt has a token id outside the model's vocabulary of {vocab_size}: "
            "use the tokenizer that is in the run folder"
        )
    if len(ids) + at_least > max_seq_len:
        raise PromptTooLong(
            f"the prompt has {len(ids)} tokens and the model takes {max_seq_len}, prompt and answer together: "
            "shorten the prompt, or train with a larger --max_seq_len"
        )
    if max_new_tokens < at_least:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least {at_least}: change it")
    return min(max_new_tokens, max_seq_len - len(ids))


class Slot:
    """The tokens that one slot of the batch has read. They stay after the request as a cached prefix."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.last_used = 0  # the step in which its last request was retired


class Scheduler:
    """Assigns requests to the slots of one batch; the running requests occupy the first slots, in any order.

    Call `step` while `busy`: each step gives every running request one token. Requests are admitted first come, first
    served. A slot keeps its tokens when its request is retired: if the next prompt begins with all of them, as the next
    turn of a conversation does, only the rest is prefilled. The least recently used prefix is evicted first.
    """

    def __init__(
        self,
        model: BaseModel,
        n_slots: int,
        max_len: int | None = None,
        max_queue: int | None = None,
        decode_step: DecodeStep | None = None,
    ) -> None:
        """max_len: tokens per slot (default max_seq_len). max_queue: requests that may wait (default: any number)."""
        self.model = model
        self.max_queue = max_queue
        self.device = next(model.parameters()).device
        self.batch = open_batch(model, n_slots, max_len or model.args.max_seq_len, decode_step)
        self.slots = [Slot() for _ in range(n_slots)]
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.steps = 0
        self.prefilled_tokens = 0  # of prompts
        self.cached_tokens = 0  # of prompts, found in a slot
        self._lock = threading.Lock()  # guards `waiting` alone; never held during a forward pass

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, *requests: Request) -> None:
        """Queue requests, all or none. UserError for a prompt that cannot be answered, QueueFull."""
        for request in requests:
            at_least = 0 if request.max_new_tokens == 0 else 1
            limit = max_completion_tokens(self.model, request.ids, request.max_new_tokens, at_least)
            request.start(limit, self.model.args.vocab_size, self.device)
        with self._lock:
            if self.max_queue is not None and len(self.waiting) + len(requests) > self.max_queue:
                raise QueueFull
            self.waiting.extend(requests)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Cancel, decode, admit, sample and retire: the requests that got a token or ended."""
        self.steps += 1
        changed = self._cancel()
        changed += self._decode()
        for request in changed:
            request.notify()
        return changed

    def abort(self, error: str, exception: Exception | None = None) -> list[Request]:
        """Fail all running requests and invalidate every cached prefix: the model failed in the middle of a step."""
        failed = self.running
        self.running = []
        for slot in self.slots:
            slot.ids = []
        for request in failed:
            request.exception = exception
            request.end("error", error)
            request.notify()
        return failed

    def _decode(self) -> list[Request]:
        """Sample one token for every running and every admitted request; returns them."""
        logits = []
        if self.running:
            logits.append(self._forward(0, [request.tokens[-1:] for request in self.running]))
        logits += self._prefill(self._admit())
        if not logits:
            return []
        sample_batch(self.running, logits[0] if len(logits) == 1 else torch.cat(logits))
        sampled = [*self.running]
        self._retire()
        return sampled

    def _cancel(self) -> list[Request]:
        """End the requests that were cancelled or are overdue, waiting or running; returns them."""
        with self._lock:
            ended = [request for request in self.waiting if request.cancelled or request.overdue()]
            for request in ended:
                self.waiting.remove(request)
        ended += [request for request in self.running if request.cancelled or request.overdue()]
        for request in ended:
            request.end("cancelled" if request.cancelled else "deadline")
        self._retire()
        return ended

    def _admit(self) -> list[Request]:
        """Move waiting requests into free slots, those with the fewest tokens to prefill first; returns them."""
        taken = self._next(len(self.slots) - len(self.running))
        try:
            return self._place(taken)
        except Exception:
            self.running += [request for request in taken if request not in self.running]  # `abort` ends them
            raise

    def _place(self, requests: list[Request]) -> list[Request]:
        """Give each of `requests` a slot; returns them in the order of their slots."""
        admitted = []
        free = self.slots[len(self.running) :]
        for request in requests:
            slot = self._find_slot(free, request)
            free.remove(slot)
            request.cached_tokens = len(slot.ids)
            self.cached_tokens += request.cached_tokens
            admitted.append((request, slot))
        admitted.sort(key=lambda pair: _uncached(pair[0]))
        for request, slot in admitted:
            self._swap(self.slots.index(slot), len(self.running))
            self.running.append(request)
        return [request for request, _ in admitted]

    def _prefill(self, admitted: list[Request]) -> list[torch.Tensor]:
        """Read the prompts of the last running requests; returns their logits, in order.

        Prompts with equally many new tokens share a forward pass. There is no padding: a recurrent state would keep it.
        """
        first = len(self.running) - len(admitted)
        logits = []
        for (count, scored), group in groupby(admitted, lambda request: (_uncached(request), request.score_prompt)):
            requests = list(group)
            if scored:
                logits += [self._score(first + index, request) for index, request in enumerate(requests)]
            else:
                logits.append(self._forward(first, [request.ids[-count:] for request in requests]))
            self.prefilled_tokens += count * len(requests)
            first += len(requests)
        return logits

    def _score(self, index: int, request: Request) -> torch.Tensor:
        """Read one prompt and record the log-probabilities of its tokens; returns its last logits (1, V).

        They are NaN if any of its logits was: the request then ends as one whose answer has non-finite logits.
        """
        ids = torch.tensor(request.ids, device=self.device)
        n_top = request.top_logprobs or 0
        for start in range(0, len(ids), SCORED_TOKENS):
            piece = request.ids[start : start + SCORED_TOKENS]
            logits = self._forward(index, [piece], all_logits=True)[0]  # (T, V)
            following = ids[start + 1 : start + 1 + len(piece)]
            request.prompt_logprobs += token_logprobs(logits[: len(following)], following, [n_top] * len(following))
        is_nan = any(math.isnan(own) for own, _ in request.prompt_logprobs)
        return torch.full_like(logits[-1:], math.nan) if is_nan else logits[-1:]

    def _next(self, at_most: int) -> list[Request]:
        """Take up to `at_most` waiting requests from the queue, within PREFILL_TOKENS."""
        taken: list[Request] = []
        n_tokens = 0
        with self._lock:
            while self.waiting and len(taken) < at_most and n_tokens < PREFILL_TOKENS:
                taken.append(self.waiting.popleft())
                n_tokens += len(taken[-1].ids)
        return taken

    def _find_slot(self, free: list[Slot], request: Request) -> Slot:
        """Return the slot with the longest cached prefix of the prompt, else the least recently used one, emptied.

        The prompt must begin with all tokens of the slot: a recurrent state cannot go back to an earlier token. One
        whose own log-probabilities are asked for is read in full.
        """
        ids = request.ids
        n_tokens = min(len(ids) + request.max_new_tokens + MARGIN, self.batch.max_len)
        known = [] if request.score_prompt else free
        matching = [slot for slot in known if len(slot.ids) < len(ids) and slot.ids == ids[: len(slot.ids)]]
        best = max(matching, key=lambda slot: len(slot.ids), default=None)
        if best is None or not best.ids or not self.batch.has_room(n_tokens):
            best = min(free, key=lambda slot: slot.last_used)
            best.ids = []
            self._clear(self.slots.index(best), n_tokens)
        return best

    def _clear(self, index: int, n_tokens: int) -> None:
        self.batch.clear(index, n_tokens)

    def _forward(self, first: int, new: list[list[int]], all_logits: bool = False) -> torch.Tensor:
        """Append equally many tokens to each of the slots from `first` on: logits (B, V), or (B, T, V) of all."""
        slots = self.slots[first : first + len(new)]
        lengths = [len(slot.ids) for slot in slots]
        logits = self.batch.append(first, lengths, torch.tensor(new, device=self.device), all_logits)
        for slot, ids in zip(slots, new, strict=True):
            slot.ids += ids
        return logits

    def _retire(self) -> None:
        """Swap the slots of ended requests behind those of the running ones."""
        for index in reversed(range(len(self.running))):
            request = self.running[index]
            slot = self.slots[index]
            last = len(self.running) - 1
            if request.finish is not None:
                slot.last_used = self.steps
                self._swap(index, last)
                self.running[index] = self.running[last]
                self.running.pop()
                if request.finish == "error":
                    slot.ids = []  # not a prefix to reuse

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self.batch.swap(a, b)
            self.slots[a], self.slots[b] = self.slots[b], self.slots[a]


def _uncached(request: Request) -> int:
    """The number of tokens of its prompt that must be prefilled."""
    return len(request.ids) - request.cached_tokens


def sample_batch(requests: list[Request], logits: torch.Tensor) -> None:
    """Sample the next token of every request from logits (B, V), one row per request."""
    unpenalized = logits
    device = logits.device
    penalized = [index for index, request in enumerate(requests) if request.settings.has_penalties()]
    if penalized:
        logits = logits.float().clone()
        for index in penalized:
            logits[index] = requests[index].penalize(logits[index])
    by_settings: dict[Sampling, list[int]] = {}
    for index, request in enumerate(requests):
        by_settings.setdefault(request.settings, []).append(index)
    greedy = all(settings.temperature == 0 for settings in by_settings)  # then no random number is used
    uniform = None
    if not greedy:
        uniform = torch.tensor([request.uniforms[len(request.tokens)] for request in requests], device=device)
    if len(by_settings) == 1:
        tokens = sample(logits, requests[0].settings, uniform)
    else:
        tokens = torch.empty(len(requests), dtype=torch.long, device=device)
        for settings, indices in by_settings.items():
            at = torch.tensor(indices, device=device)
            tokens[at] = sample(logits[at], settings, None if uniform is None else uniform[at])
    chosen = tokens.tolist()  # the only synchronization with the device
    logprobs = _logprobs(requests, unpenalized, tokens)
    for index, request in enumerate(requests):
        request.accept(chosen[index], logprobs.get(index))


def _logprobs(requests: list[Request], logits: torch.Tensor, tokens: torch.Tensor) -> dict[int, Logprobs]:
    """Return {index: log-probabilities} of the requests that ask for them."""
    asking = {i: request.top_logprobs for i, request in enumerate(requests) if request.top_logprobs is not None}
    if not asking:
        return {}
    index = torch.tensor(list(asking), device=logits.device)
    found = token_logprobs(logits[index], tokens[index].clamp(min=0), [*asking.values()])
    return dict(zip(asking, found, strict=True))


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, n_tops: list[int]) -> list[Logprobs]:
    """Return the log-probabilities of tokens (N,) by their logits (N, V), with that many alternatives of each."""
    if not n_tops:
        return []
    own, top, ids = log_probabilities(logits, tokens, max(n_tops))
    return [
        (own_logprob, dict(list(zip(top_ids, logs))[:n_top]))
        for n_top, own_logprob, top_ids, logs in zip(n_tops, own.tolist(), ids.tolist(), top.tolist(), strict=True)
    ]
