"""From logits to the next token: penalties, filters, and a draw that depends only on the seed of its sequence."""

import secrets
from dataclasses import dataclass, replace

import torch

from engine.inference.options import SAMPLING_BOUNDS
from utils.config import check_bounds, opt


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises UserError for a setting outside its bounds.

    Temperature 0 is greedy: the likeliest token, and no filter matters.
    """

    temperature: float = opt(1.0, "divides the logits", **SAMPLING_BOUNDS["temperature"])
    top_k: int = opt(0, "keep the k likeliest tokens; 0 keeps all", **SAMPLING_BOUNDS["top_k"])
    top_p: float = opt(1.0, "keep the fewest tokens whose probabilities reach p", **SAMPLING_BOUNDS["top_p"])
    min_p: float = opt(0.0, "drop tokens less likely than min_p times the likeliest", **SAMPLING_BOUNDS["min_p"])
    repetition_penalty: float = opt(
        1.0,
        "positive logits of tokens of prompt and answer are divided by it, negative ones multiplied",
        **SAMPLING_BOUNDS["repetition_penalty"],
    )
    frequency_penalty: float = opt(
        0.0, "subtracted from a token's logit per occurrence in the answer", **SAMPLING_BOUNDS["frequency_penalty"]
    )
    presence_penalty: float = opt(
        0.0,
        "subtracted once from the logit of a token in the answer",
        **SAMPLING_BOUNDS["presence_penalty"],
    )
    seed: int | None = opt(None, "of the random numbers; None: a new one per request", **SAMPLING_BOUNDS["seed"])

    def __post_init__(self) -> None:
        check_bounds(self)

    def offset_seed(self, index: int) -> "Sampling":
        """Return the settings of sequence `index` of a batch: its seed is seed + index, so it does not depend on the
        others."""
        return self if self.seed is None else replace(self, seed=(self.seed + index) % 2**63)

    def has_penalties(self) -> bool:
        """Return whether the tokens so far change the logits."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

    def uniforms(self, n_tokens: int) -> torch.Tensor:
        """Return the random numbers of one answer, in (0, 1], float32 on the CPU.  # (n_tokens,)

        They are drawn before the first step and on the CPU, so a seed means the same on every device. Each answer has
        its own generator: the other requests of the batch change nothing.
        """
        seed = secrets.randbits(48) if self.seed is None else self.seed
        return 1 - torch.rand(n_tokens, generator=torch.Generator().manual_seed(seed))


def penalize(logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Lower the logits of tokens that occurred already.  # (V,) -> (V,)

    seen (V,) bool: tokens of prompt and answer, for the repetition penalty (Keskar et al. 2019, section 4.1); counts
    (V,): occurrences in the answer, for the frequency and presence penalties of OpenAI's API.
    """
    scaled = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    logits = torch.where(seen, scaled, logits)
    return logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)


def filter_logits(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the probabilities and ids of the tokens that pass the filters, both (B, N); ids None: column n is token n.

    The filters apply in this order, each to what the one before kept: temperature, top-k, top-p, min-p.
    """
    logits = logits.float()
    ids = None
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    scores = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-6)  # (B, V)
    if 0 < sampling.top_k < scores.shape[-1]:
        scores, ids = scores.topk(sampling.top_k)  # sorted, likeliest first
    probs = scores.softmax(-1)
    if sampling.top_p < 1:
        if ids is None:
            probs, ids = sort_descending(probs, sampling.top_p)
        mass_before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(mass_before >= sampling.top_p, 0)
    if sampling.min_p > 0:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True), ids


def sort_descending(probs: torch.Tensor, mass: float, few: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort probabilities, or only the `few` largest where they reach `mass`.  # (B, V) -> (B, N), (B, N)

    On the CPU, sorting a large vocabulary takes longer than the forward pass of a small model. Each sequence decides
    for itself, so its tokens do not depend on the batch. On a GPU a full sort is cheaper than the synchronization.
    """
    if probs.device.type != "cpu" or probs.shape[-1] <= few:
        return probs.sort(dim=-1, descending=True, stable=True)
    top, ids = probs.topk(few)
    lacking = top.sum(-1) < mass  # (B,)
    if lacking.any():
        padding = (0, probs.shape[-1] - few)
        top = torch.nn.functional.pad(top, padding)
        ids = torch.nn.functional.pad(ids, padding)
        top[lacking], ids[lacking] = probs[lacking].sort(dim=-1, descending=True, stable=True)
    return top, ids


def distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the probability of every token after all filters.  # (B, V) -> (B, V)"""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    probs, ids = filter_logits(logits, sampling)
    return probs if ids is None else torch.zeros_like(logits, dtype=probs.dtype).scatter_add(-1, ids, probs)


def sample(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor | None) -> torch.Tensor:
    """Sample one token per sequence; -1 where the logits are non-finite.  # (B, V), (B,) in (0, 1] -> (B,)

    Greedy sampling ignores `uniform`. Otherwise the cumulative distribution is inverted: the first token at which it
    reaches `uniform`. The probability of that token is above 0, so a filtered token is never drawn.
    """
    if sampling.temperature == 0:
        highest, tokens = logits.max(-1)  # on the CPU four times as fast as argmax
    else:
        assert uniform is not None
        highest = logits.amax(-1)
        probs, ids = filter_logits(logits, sampling)
        cumulative = probs.cumsum(-1)
        index = torch.searchsorted(cumulative, uniform.to(cumulative)[:, None] * cumulative[:, -1:])  # (B, 1)
        tokens = (index if ids is None else ids.gather(-1, index.clamp(max=ids.shape[-1] - 1)))[:, 0]
    return tokens.masked_fill(~highest.isfinite(), -1)  # checked by the caller, who reads the tokens anyway


def log_probabilities(
    logits: torch.Tensor, tokens: torch.Tensor, n_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the model's own log-probabilities, before any filter.

    # (B, V), (B,) -> (B,), (B, n_top), (B, n_top): of the tokens, of the n_top likeliest tokens, and their ids
    """
    logs = logits.float().log_softmax(-1)
    top, ids = logs.topk(min(n_top, logs.shape[-1]))
    return logs.gather(-1, tokens[:, None])[:, 0], top, ids
