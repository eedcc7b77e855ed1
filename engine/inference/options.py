"""Settings of a generation, the same for the terminal, the page and the server. No torch here: --help must be fast."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from utils.config import check_bounds, opt
from utils.errors import UserError

SAMPLING_BOUNDS: dict[str, dict[str, Any]] = {
    "temperature": {"ge": 0, "lt": math.inf},
    "top_k": {"ge": 0},
    "top_p": {"gt": 0, "le": 1},
    "min_p": {"ge": 0, "le": 1},
    "repetition_penalty": {"gt": 0, "lt": math.inf},
    "frequency_penalty": {"ge": -2, "le": 2},
    "presence_penalty": {"ge": -2, "le": 2},
    "seed": {"ge": 0, "lt": 2**63},
}
SAMPLING = tuple(SAMPLING_BOUNDS)
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
SPECULATIVE = ("draft", "ngram")  # how tokens are drafted (engine/inference/speculative.py)


@dataclass
class GenerationOptions:
    max_new_tokens: int = opt(512, "longest answer, in tokens", ge=1)
    temperature: float = opt(
        0.7, "0 always takes the likeliest token, higher is more varied", **SAMPLING_BOUNDS["temperature"]
    )
    top_k: int = opt(0, "keep the k likeliest tokens (0: all)", **SAMPLING_BOUNDS["top_k"])
    top_p: float = opt(0.9, "keep the fewest tokens whose probabilities reach p (1: all)", **SAMPLING_BOUNDS["top_p"])
    min_p: float = opt(
        0.0, "drop tokens less likely than min_p times the likeliest (0: none)", **SAMPLING_BOUNDS["min_p"]
    )
    repetition_penalty: float = opt(
        1.0,
        "above 1, tokens of the prompt and the answer become less likely",
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
    seed: int | None = opt(
        None, "the same seed gives the same answer (none: a new one each time)", **SAMPLING_BOUNDS["seed"]
    )
    device: str = opt("auto", "auto takes cuda, then mps, then cpu", choices=("auto", "cuda", "mps", "cpu"))

    def __post_init__(self) -> None:
        check_bounds(self)

    def sampling(self) -> dict[str, Any]:
        """Return the fields that `Sampling` (engine/inference/sampling.py) takes."""
        return {name: value for name, value in asdict(self).items() if name in SAMPLING}


@dataclass
class ChatOptions(GenerationOptions):
    output_path: str = opt("output", "folder of the runs", path=True)
    precision: str = opt("fp32", "of the weights; int8: of the matrices, the rest in bf16", choices=PRECISIONS)


def check_speculative_name(kind: str) -> None:
    """Raise UserError unless `kind` is "" or one of SPECULATIVE."""
    if kind == "mtp":
        raise UserError("--speculative=mtp has a new name: use --speculative=draft")
    if kind not in ("", *SPECULATIVE):
        raise UserError(f"--speculative={kind}: choose one of {', '.join(SPECULATIVE)}, or leave it out")
