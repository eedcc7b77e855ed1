"""Continuous batching: requests join and leave a running batch at any step, and none of them can tell."""

import threading
from collections import deque
from itertools import groupby

import torch

from engine.inference.batch import open_rows
from engine.inference.sampling import log_probabilities, pick
from utils.errors import UserError

READ_TOKENS = 4096  # of prompts a step: those who are being answered wait no longer than that takes


class QueueFull(Exception):
    """More requests wait than the batch takes."""


def room(model, ids, max_new_tokens):
    """How many tokens may follow this prompt; UserError when there is nothing to go by or no room for a token."""
    vocab_size, longest = model.args.vocab_size, model.args.max_seq_len
    if not ids:
        raise UserError("the prompt is empty: a model needs at least one token, such as <s>, to go on from")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UserError(
            f"the prompt has a token id outside the model's vocabulary of {vocab_size}: "
            "use the tokenizer that is in the run folder"
        )
    if len(ids) >= longest:
        raise UserError(
            f"the prompt has {len(ids)} tokens and the model takes {longest}, prompt and answer together: "
            "shorten the prompt, or train with a larger --max_seq_len"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} asks for nothing: give 1 or more")
    return min(max_new_tokens, longest - len(ids))


class Memory:
    """What a row of the batch has read."""

    def __init__(self):
        self.ids = []  # the tokens; they stay when the request has left, for whoever goes on from there
        self.left = 0  # the step at which the last request left


class Batch:
    """`slots` rows of one state; the first rows belong to the requests that are being answered, in any order.

    `step` is all there is to it, a plain function that the caller repeats while `busy`. Requests are taken in the order
    they came, and each that is being answered gets one token a step, so that none waits for another for ever. A row
    keeps its memory when its request leaves: the next turn of the conversation, whose prompt begins with all of it,
    reads only what is new. The memory that was left longest ago makes room for what is not known.
    """

    def __init__(self, model, slots, max_len=None, queue=None):
        self.model, self.queue = model, queue  # queue: how many may wait, None: any number
        self.device = next(model.parameters()).device
        self.rows = open_rows(model, slots, max_len or model.args.max_seq_len)
        self.memories = [Memory() for _ in range(slots)]
        self.running, self.waiting = [], deque()
        self.steps = self.read = self.reused = 0  # steps; tokens of prompts that were read; that were known already
        self._lock = threading.Lock()  # of `waiting` alone: never held while the model works

    @property
    def busy(self):
        return bool(self.running or self.waiting)

    def add(self, *requests):
        """Let requests wait for their turn, all or none. UserError for a prompt that cannot be answered, QueueFull."""
        for request in requests:
            request.start(
                room(self.model, request.ids, request.max_new_tokens), self.model.args.vocab_size, self.device
            )
        with self._lock:
            if self.queue is not None and len(self.waiting) + len(requests) > self.queue:
                raise QueueFull
            self.waiting.extend(requests)

    @torch.inference_mode()
    def step(self):
        """Let go of who has ended, take in who waits, and write one token each: the requests that grew or ended."""
        self.steps += 1
        moved, parts = self._let_go(), []
        if self.running:
            parts.append(self._append(0, [request.tokens[-1:] for request in self.running]))
        parts += self._take_in()
        if parts:
            choose(self.running, parts[0] if len(parts) == 1 else torch.cat(parts))
            moved += self.running
            self._leave()
        for request in moved:
            request.notify()
        return moved

    def abort(self, finish, error=""):
        """End the requests that are being answered, and trust no memory: the model failed in the middle of a step."""
        gone, self.running = self.running, []
        for memory in self.memories:
            memory.ids = []
        for request in gone:
            request.end(finish, error)
            request.notify()

    def _let_go(self):
        """End the requests that were cancelled or ran out of time, the waiting ones too; returns them."""
        with self._lock:
            gone = [request for request in self.waiting if request.cancelled or request.overdue()]
            for request in gone:
                self.waiting.remove(request)
        gone += [request for request in self.running if request.cancelled or request.overdue()]
        for request in gone:
            request.end("cancelled" if request.cancelled else "deadline")
        self._leave()
        return gone

    def _take_in(self):
        """Read the prompts of those whose turn it is; returns their logits, behind those of the running ones."""
        joining, free = [], self.memories[len(self.running) :]
        for request in self._next(len(free)):
            memory = self._best(free, request.ids)
            free.remove(memory)
            joining.append((request, memory))

        def unread(pair):
            return len(pair[0].ids) - len(pair[1].ids)

        joining.sort(key=unread)
        first, parts = len(self.running), []
        for request, memory in joining:
            self._swap(self.memories.index(memory), len(self.running))
            self.running.append(request)
            request.reused = len(memory.ids)
            self.reused += request.reused
        # Equally many tokens go through in one pass. No padding: a recurrent state would swallow it.
        for count, group in groupby(joining, unread):
            new = [request.ids[-count:] for request, _ in group]
            parts.append(self._append(first, new))
            self.read += count * len(new)
            first += len(new)
        return parts

    def _next(self, most):
        """Up to `most` of those who wait, first come, first served."""
        taken, tokens = [], 0
        with self._lock:
            while self.waiting and len(taken) < most and tokens < READ_TOKENS:
                taken.append(self.waiting.popleft())
                tokens += len(taken[-1].ids)
        return taken

    def _best(self, free, ids):
        """The memory to go on from: the longest that the prompt begins with, else the oldest, made empty.

        All of a memory must fit: a recurrent state cannot go back to an earlier token.
        """
        known = [memory for memory in free if len(memory.ids) < len(ids) and memory.ids == ids[: len(memory.ids)]]
        best = max(known, key=lambda memory: len(memory.ids), default=None)
        if best is None or not best.ids:
            best = min(free, key=lambda memory: memory.left)
            best.ids = []
            self.rows.clear(self.memories.index(best))
        return best

    def _append(self, first, new):
        """Read as many new tokens in each of the rows from `first` on: logits (B, V)."""
        memories = self.memories[first : first + len(new)]
        logits = self.rows.append(
            first, [len(memory.ids) for memory in memories], torch.tensor(new, device=self.device)
        )
        for memory, ids in zip(memories, new):
            memory.ids += ids
        return logits

    def _leave(self):
        """Rows whose request has ended change places with the last running one."""
        for row in reversed(range(len(self.running))):
            request, memory, last = self.running[row], self.memories[row], len(self.running) - 1
            if request.finish is not None:
                memory.left = self.steps
                self._swap(row, last)
                self.running[row] = self.running[last]
                self.running.pop()
                if request.finish == "error":
                    memory.ids = []  # nobody goes on from there

    def _swap(self, a, b):
        if a != b:
            self.rows.swap(a, b)
            self.memories[a], self.memories[b] = self.memories[b], self.memories[a]


def choose(requests, logits):
    """Give every request its next token. logits (B, V), a row a request."""
    raw, device = logits, logits.device
    penalized = [row for row, request in enumerate(requests) if request.settings.penalizes()]
    if penalized:
        logits = logits.float().clone()
        for row in penalized:
            logits[row] = requests[row].penalize(logits[row])
    alike = {}
    for row, request in enumerate(requests):
        alike.setdefault(request.settings, []).append(row)
    greedy = all(settings.temperature == 0 for settings in alike)  # then nothing is drawn
    uniform = None if greedy else torch.tensor([one.uniforms[len(one.tokens)] for one in requests], device=device)
    if len(alike) == 1:
        tokens = pick(logits, requests[0].settings, uniform)
    else:
        tokens = torch.empty(len(requests), dtype=torch.long, device=device)
        for settings, rows in alike.items():
            rows = torch.tensor(rows, device=device)
            tokens[rows] = pick(logits[rows], settings, None if greedy else uniform[rows])
    chosen = tokens.tolist()  # the one place where the host waits for the device
    logprobs = _logprobs(requests, raw, tokens)
    for row, request in enumerate(requests):
        request.accept(chosen[row], logprobs.get(row))


def _logprobs(requests, logits, tokens):
    """{row: (log-probability of its token, {id: log-probability} of the likeliest)} of those who ask."""
    rows = [row for row, request in enumerate(requests) if request.top_logprobs is not None]
    if not rows:
        return {}
    index = torch.tensor(rows, device=logits.device)
    most = max(requests[row].top_logprobs for row in rows)
    own, top, ids = log_probabilities(logits[index], tokens[index].clamp(min=0), most)
    return {
        row: (one, dict(list(zip(ids_of_row, logs))[: requests[row].top_logprobs]))
        for row, one, ids_of_row, logs in zip(rows, own.tolist(), ids.tolist(), top.tolist())
    }
