"""From logits to the next token: the filters, and one draw that depends on nothing but its row's seed."""

import secrets
from dataclasses import dataclass, replace

import torch

from utils.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest, and then the filters play no part."""

    temperature: float = 1.0  # logits are divided by it
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest likeliest tokens whose probabilities reach p; 1 keeps all
    min_p: float = 0.0  # drop tokens less likely than min_p times the likeliest; 0 drops none
    repetition_penalty: float = 1.0  # positive logits of tokens already there are divided by it, negative multiplied
    frequency_penalty: float = 0.0  # taken off the logit of a token for every time it stands in the answer
    presence_penalty: float = 0.0  # taken off once for a token that stands in the answer
    seed: int | None = None  # row i draws from seed + i, so it gets the same text alone; None: fresh each call

    def __post_init__(self):
        for name, allowed, holds in (
            ("temperature", "at least 0 (0 is greedy)", 0 <= self.temperature < float("inf")),
            ("top_k", "0 (off) or more", self.top_k >= 0),
            ("top_p", "above 0 and at most 1 (1 is off)", 0 < self.top_p <= 1),
            ("min_p", "from 0 (off) to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "above 0 (1 is off)", 0 < self.repetition_penalty < float("inf")),
            ("frequency_penalty", "from -2 to 2 (0 is off)", -2 <= self.frequency_penalty <= 2),
            ("presence_penalty", "from -2 to 2 (0 is off)", -2 <= self.presence_penalty <= 2),
            ("seed", "0 or more and below 2^63", self.seed is None or 0 <= self.seed < 2**63),
        ):
            if not holds:
                raise UserError(f"{name}={getattr(self, name)} is out of range: give {allowed}")

    def of_row(self, row):
        """The settings of one row of a batch: its own seed."""
        return self if self.seed is None else replace(self, seed=(self.seed + row) % 2**63)

    def penalizes(self):
        """Whether it matters which tokens are there already."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

    def uniforms(self, steps):
        """The random numbers of one answer, in (0, 1], float32 on the CPU.  # (steps,)

        Drawn before the first step and on the CPU, so a seed means the same on every device and no step waits for
        one. Each answer has a generator of its own: what is written beside it changes nothing.
        """
        seed = secrets.randbits(48) if self.seed is None else self.seed
        return 1 - torch.rand(steps, generator=torch.Generator().manual_seed(seed))


def penalize(logits, sampling, seen, counts):
    """Make tokens that are already there less likely.  # (V,) -> (V,)

    seen (V,) bool: those of prompt and answer, for the repetition penalty (Keskar et al. 2019, section 4.1); counts
    (V,): how often each stands in the answer, for the two penalties that OpenAI's API has.
    """
    scaled = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    logits = torch.where(seen, scaled, logits)
    return logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)


def candidates(logits, sampling):
    """The tokens that may come next: probabilities and ids, both (B, N); ids is None where column n is token n.

    The filters work in this order, each on what the one before left: temperature, top-k, top-p, min-p.
    """
    logits = logits.float()
    # The likeliest becomes 0 first: then no temperature, however small, can overflow.
    scores, ids = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-6), None  # (B, V)
    if 0 < sampling.top_k < scores.shape[-1]:
        scores, ids = scores.topk(sampling.top_k)  # sorted, likeliest first
    probs = scores.softmax(-1)
    if sampling.top_p < 1:
        if ids is None:
            probs, ids = likeliest_first(probs, sampling.top_p)
        likelier = probs.cumsum(-1) - probs  # mass of the tokens before this one
        probs = probs.masked_fill(likelier >= sampling.top_p, 0)
    if sampling.min_p > 0:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True), ids


def likeliest_first(probs, mass, few=1024):
    """Sort probabilities, or only the likeliest few of them where those have the mass.  # (B, V) -> (B, N), (B, N)

    On the CPU sorting a large vocabulary takes longer than a small model's forward. Each row decides for itself, so
    its tokens do not depend on its neighbours. An accelerator sorts fast, and would have to wait for the question.
    """
    if probs.device.type != "cpu" or probs.shape[-1] <= few:
        return probs.sort(dim=-1, descending=True, stable=True)
    top, ids = probs.topk(few)
    lacking = top.sum(-1) < mass  # (B,)
    if lacking.any():
        rest = (0, probs.shape[-1] - few)
        top, ids = torch.nn.functional.pad(top, rest), torch.nn.functional.pad(ids, rest)
        top[lacking], ids[lacking] = probs[lacking].sort(dim=-1, descending=True, stable=True)
    return top, ids


def distribution(logits, sampling):
    """The probability of every token of the vocabulary after all filters.  # (B, V) -> (B, V)"""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    probs, ids = candidates(logits, sampling)
    return probs if ids is None else torch.zeros_like(logits, dtype=probs.dtype).scatter_add(-1, ids, probs)


def pick(logits, sampling, uniform):
    """Choose a token a row; -1 where the logits are not finite.  # (B, V), (B,) in (0, 1] -> (B,)

    Greedy draws nothing, and `uniform` may be None.

    The draw inverts the cumulative distribution: the first token at which it reaches `uniform`. That token's own
    probability is above 0 by construction, so a token that was filtered out cannot be drawn.
    """
    if sampling.temperature == 0:
        highest, tokens = logits.max(-1)  # on the CPU one pass in a quarter of the time that argmax takes
    else:
        highest = logits.amax(-1)
        probs, ids = candidates(logits, sampling)
        reached = probs.cumsum(-1)
        tokens = torch.searchsorted(reached, uniform.to(reached)[:, None] * reached[:, -1:])  # (B, 1)
        tokens = (tokens if ids is None else ids.gather(-1, tokens.clamp(max=ids.shape[-1] - 1)))[:, 0]
    return tokens.masked_fill(~highest.isfinite(), -1)  # the caller reads the tokens anyway: no extra wait


def log_probabilities(logits, tokens, n_top):
    """How likely the model itself found the tokens, and the n_top likeliest, before any filter.

    # (B, V), (B,) -> (B,), (B, n_top), (B, n_top): natural logarithms of the tokens and of the likeliest, their ids
    """
    logs = logits.float().log_softmax(-1)
    top, ids = logs.topk(min(n_top, logs.shape[-1]))
    return logs.gather(-1, tokens[:, None])[:, 0], top, ids
