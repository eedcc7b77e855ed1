"""The settings of a conversation, the same wherever a model answers. No torch here: --help must be quick."""

from dataclasses import asdict, dataclass

from utils.config import opt

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
)


@dataclass
class AnswerOptions:
    max_new_tokens: int = opt(512, "longest answer, in tokens")
    temperature: float = opt(0.7, "0 always takes the likeliest token, higher is more varied")
    top_k: int = opt(0, "keep the k likeliest tokens (0: all)")
    top_p: float = opt(0.9, "keep the fewest tokens whose probabilities reach p (1: all)")
    min_p: float = opt(0.0, "drop tokens less likely than min_p times the likeliest (0: none)")
    repetition_penalty: float = opt(1.0, "above 1, tokens already there become less likely")
    frequency_penalty: float = opt(0.0, "taken off a token's logit for every time it stands in the answer")
    presence_penalty: float = opt(0.0, "taken off once for a token that stands in the answer")
    seed: int | None = opt(None, "the same seed gives the same answer (none: a fresh one each time)")
    device: str = opt("auto", "auto takes cuda, then mps, then cpu", choices=("auto", "cuda", "mps", "cpu"))

    def sampling(self):
        """The fields that engine.sampling.Sampling takes, as a dict."""
        return {name: value for name, value in asdict(self).items() if name in SAMPLING}


@dataclass
class TalkOptions(AnswerOptions):
    output_path: str = opt("output", "folder of the runs", path=True)
    precision: str = opt(
        "fp32", "of the weights; int8: of the matrices, the rest in bf16", choices=("fp32", "bf16", "fp16", "int8")
    )
