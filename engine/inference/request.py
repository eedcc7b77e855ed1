"""One prompt, how to answer it, and the answer while it is written."""

import time
from dataclasses import replace

import torch

from engine.inference.detokenizer import Writer
from engine.inference.sampling import penalize


class Request:
    """What is asked: `ids`, the prompt; when to end; how to choose. What has been written so far: `tokens`, without
    the stop token; `text`, if there is a tokenizer; `logprobs`, if asked for. `finish` says how it ended.

    Whoever follows a request from another thread finds its fields right at any moment, and `finish` is set last.
    """

    def __init__(
        self,
        ids,
        max_new_tokens,
        sampling,
        stop_ids=(),
        tokenizer=None,
        stop=(),
        top_logprobs=None,
        deadline=None,
        notify=lambda: None,
    ):
        self.ids, self.max_new_tokens, self.stop_ids = ids, max_new_tokens, stop_ids
        self.top_logprobs = top_logprobs  # None: no log-probabilities; else of how many likeliest tokens beside
        self.deadline = deadline  # by time.monotonic(): what is there by then is the answer
        self.notify = notify  # called without arguments, in the batch's thread, whenever it grew or ended
        self.tokens, self.logprobs = [], []
        self.reused = 0  # tokens of the prompt that its row knew already
        self.finish = None  # "stop": the model or a stop string; "length"; "cancelled"; "deadline"; "error"
        self.error = ""  # what went wrong, when finish is "error"
        self.calls = self.guesses = self.hits = (
            0  # of the model, when it is answered by engine/inference/speculative.py
        )
        self.cancelled = False  # set it, from any thread, and the batch lets go of the request at its next step
        self.settings = replace(sampling, seed=None)  # requests with equal ones are sampled together
        self._sampling = sampling
        self.writer = Writer(tokenizer, stop) if tokenizer is not None else None

    @property
    def text(self):
        """What is final of the text: no half character, and nothing that may yet be the start of a stop string."""
        return self.writer.text

    def start(self, limit, vocab_size, device):
        """Get ready to be answered with at most `limit` tokens."""
        self.limit, self.uniforms = limit, self._sampling.uniforms(limit).tolist()
        self._seen = self._counts = None
        if self.settings.penalizes():
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(self.ids, device=device)] = True
            self._counts = torch.zeros(vocab_size, device=device)

    def penalize(self, logits):
        """The logits (V,) after the penalties for what is there already."""
        return penalize(logits, self.settings, self._seen, self._counts)

    def overdue(self):
        return self.deadline is not None and time.monotonic() > self.deadline

    def accept(self, token, logprob=None):
        """Add the chosen token, or end."""
        if token < 0:
            self.end(
                "error",
                "the model's logits are not finite: its training diverged, or the weights do not bear "
                "this precision; choose an earlier checkpoint or --precision=fp32",
            )
        elif token in self.stop_ids:
            self.end("stop")
        else:
            if logprob is not None:
                self.logprobs.append(logprob)
            self.tokens.append(token)
            if self._seen is not None:
                self._seen[token] = True
                self._counts[token] += 1
            if self.writer is not None:
                self.writer.push(token)
            if self.writer is not None and self.writer.stopped:
                self.end("stop")
            elif len(self.tokens) == self.limit:
                self.end("length")

    def end(self, finish, error=""):
        if self.writer is not None:
            self.writer.close()
        self.error, self.finish = error, finish
