"""One prompt, how it is to be answered, and the answer so far."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from engine.inference.detokenizer import StreamDetokenizer
from engine.inference.sampling import Sampling, penalize
from utils.tokenizer import Tokenizer

Logprobs = tuple[float, dict[int, float]]  # of the token, and {id: log-probability} of the likeliest


class Request:
    """The prompt `ids` and the settings; then `tokens`, the answer so far without the stop token.

    With max_new_tokens 0 the prompt is only read. `text` needs a tokenizer, `logprobs` need `top_logprobs`. `finish` is
    how the answer ended, and is None before. Another thread may read the fields at any time: each is consistent in
    itself, and `finish` is set last.
    """

    def __init__(
        self,
        ids: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: Iterable[int] = (),
        tokenizer: Tokenizer | None = None,
        stop: Iterable[str] = (),
        top_logprobs: int | None = None,
        score_prompt: bool = False,
        deadline: float | None = None,
        notify: Callable[[], object] = lambda: None,
    ) -> None:
        self.ids = ids
        self.max_new_tokens = max_new_tokens
        self.stop_ids = stop_ids
        self.top_logprobs = top_logprobs  # None: no log-probabilities; else the number of alternatives per token
        self.score_prompt = score_prompt  # the tokens of the prompt get log-probabilities, too
        self.deadline = deadline  # in time.monotonic(); the answer ends there
        self.notify = notify  # called in the scheduler's thread after every step that extended or ended the answer
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs] = []  # of the prompt's second token and all after it
        self.stop_token: tuple[int, Logprobs | None] | None = None  # that ended the answer; it is not one of `tokens`
        self.cached_tokens = 0  # tokens of the prompt that its slot had read already
        # "stop" (by the model or a stop string), "length", "cancelled", "deadline" or "error"
        self.finish: str | None = None
        self.error = ""  # the message, if finish is "error"
        self.exception: Exception | None = None  # what the model raised, if that ended the request
        self.reraise = False  # the reader raises `exception` itself, so that the worker need not print it
        self.forward_passes = 0  # with speculative decoding, as are the next two
        self.drafted = 0
        self.accepted = 0
        self.cancelled = False  # set by any thread; the scheduler ends the request in its next step
        self.settings = replace(sampling, seed=None)  # requests with equal settings are sampled together
        self.detokenizer = StreamDetokenizer(tokenizer, stop) if tokenizer is not None else None
        self._sampling = sampling
        self._seen: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None

    @property
    def text(self) -> str:
        """The final part of the text: no half character, and no possible start of a stop string."""
        assert self.detokenizer is not None, "a request without a tokenizer has no text"
        return self.detokenizer.text

    def start(self, limit: int, vocab_size: int, device: torch.device | str) -> None:
        """Prepare for an answer of at most `limit` tokens."""
        self.limit = limit
        self.uniforms: list[float] = self._sampling.uniforms(max(limit, 1)).tolist()
        self._seen = None
        self._counts = None
        if self.settings.has_penalties():
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(self.ids, device=device)] = True
            self._counts = torch.zeros(vocab_size, device=device)

    def penalize(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply the penalties for the tokens so far.  # (V,) -> (V,)"""
        assert self._seen is not None and self._counts is not None
        return penalize(logits, self.settings, self._seen, self._counts)

    def overdue(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def accept(self, token: int, logprob: Logprobs | None = None) -> None:
        """Append a sampled token, or end the answer; -1 means non-finite logits."""
        if token < 0:
            self.end(
                "error",
                "the model's logits are not finite: its training diverged, or the weights overflow in this precision; "
                "choose an earlier checkpoint or --precision=fp32",
            )
            return
        if self.limit == 0:
            self.end("length")
            return
        if token in self.stop_ids:
            self.stop_token = token, logprob
            self.end("stop")
            return
        if logprob is not None:
            self.logprobs.append(logprob)
        self.tokens.append(token)
        if self._seen is not None and self._counts is not None:
            self._seen[token] = True
            self._counts[token] += 1
        if self.detokenizer is not None:
            self.detokenizer.push(token)
        if self.detokenizer is not None and self.detokenizer.stopped:
            self.end("stop")
        elif len(self.tokens) == self.limit:
            self.end("length")

    def end(self, finish: str, error: str = "") -> None:
        if self.detokenizer is not None:
            self.detokenizer.close()
        self.error = error
        self.finish = finish
