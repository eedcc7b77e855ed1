"""Rotary position embeddings, and their scaling to contexts longer than in training."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from utils.errors import require


@dataclass
class RopeArgs:
    """Rotary scaling to contexts longer than in training; a mixin for a model's arguments.

    Pairs, all or those of low frequency, are slowed down by `rope_factor`: a longer sequence has no unseen angle.
    """

    rope_type: str = "default"  # default: as trained; linear: all pairs; llama3: Llama 3.1's ramp; yarn: YaRN's ramp
    rope_factor: float = 1.0  # s, how many times longer
    rope_original_max_seq_len: int = 0  # tokens, the context length in training; llama3 and yarn need it
    rope_low_freq_factor: float = 1.0  # llama3: pairs with fewer turns in the original length are slowed down fully
    rope_high_freq_factor: float = 4.0  # llama3: pairs with more turns stay as they are
    rope_beta_slow: float = 1.0  # yarn: as rope_low_freq_factor
    rope_beta_fast: float = 32.0  # yarn: as rope_high_freq_factor
    rope_mscale: float = 0.0  # yarn: weight of DeepSeek's correction of cos and sin; 0 = YaRN's own
    rope_mscale_all_dim: float = 0.0  # yarn: its counterpart over the full head, which goes into the softmax scale
    rope_truncate: bool = True  # yarn: the ramp begins and ends at entire pairs

    def check_rope(self):
        """Raise `ModelError` unless the fields above fit together; call it in `__post_init__`."""
        kind, factor = self.rope_type, self.rope_factor
        ramp = kind in ("llama3", "yarn")
        require(ramp or kind in ("default", "linear"), f"rope_type={kind}: choose default, linear, llama3 or yarn")
        require(factor >= 1, f"rope_factor={factor} must be at least 1: change it")
        require(kind != "default" or factor == 1, f"rope_factor={factor} needs a scaling method: set rope_type")
        require(not ramp or self.rope_original_max_seq_len > 0, f"rope_type={kind} needs rope_original_max_seq_len")
        low, high = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
        slow, fast = getattr(self, f"rope_{low}"), getattr(self, f"rope_{high}")
        require(not ramp or 0 < slow < fast, f"rope_{low}={slow} must lie between 0 and rope_{high}={fast}")


class Rotary(nn.Module):
    """Tables of the rotary position embedding (Su et al. 2021): pair j of a head rotates by pos * theta^(-2j/K).

    scaling: RopeArgs; proportion: share of the pairs, the first ones, that turn. (1|B, T) -> cos, sin (1|B, T, 1, K/2).
    """

    def __init__(self, head_dim, max_seq_len, theta, scaling=None, proportion=1.0):
        super().__init__()
        frequencies = rope_frequencies(head_dim, theta, scaling)
        frequencies[int(proportion * len(frequencies)) :] = 0
        angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)
        amplitude = rope_amplitude(scaling)
        self.register_buffer("cos", (angles.cos() * amplitude).float(), persistent=False)
        self.register_buffer("sin", (angles.sin() * amplitude).float(), persistent=False)

    def forward(self, positions):
        return self.cos[positions][:, :, None], self.sin[positions][:, :, None]


def rotate(x, cos, sin):
    """Rotate the pairs (x[j], x[j + R/2]) of every head, R = 2 * cos.shape[-1], and pass on the channels from R on.

    x (B, T, H, K) -> same shape. Why other code pairs neighbours: see `interleaved_rows` of model/hf/tensors.py.
    """
    a, b, rest = x.float().tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)


def token_positions(input_ids, state=None):
    """Return the positions of `input_ids` (B, T): (1, T) from 0 on, or (B, T) after what `state` has seen."""
    if state is not None:
        return state.positions(input_ids.shape[1])
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None]


def rope_frequencies(head_dim, theta, scaling=None):
    """Return the angle per token of each pair (K/2,), float64: theta^(-2j/K), scaled by `scaling`."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling is None or scaling.rope_type in ("default", "linear"):  # linear: Chen et al. 2023, equation 4
        return frequencies / (scaling.rope_factor if scaling else 1.0)
    length = scaling.rope_original_max_seq_len
    if scaling.rope_type == "llama3":  # linear in the turns (Meta's llama-models, apply_scaling of Llama 3.1)
        turns = length * frequencies / (2 * math.pi)
        low, high = scaling.rope_low_freq_factor, scaling.rope_high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:  # linear in the index of the pair (Peng et al. 2023, "YaRN", section 3.2, and DeepSeek-V3's code)
        bounds = (scaling.rope_beta_fast, scaling.rope_beta_slow)  # turns within the original length, of which pair?
        pair_of = [head_dim * math.log(length / (t * 2 * math.pi)) / (2 * math.log(theta)) for t in bounds]
        down, up = (math.floor, math.ceil) if scaling.rope_truncate else (float, float)
        first, last = max(down(pair_of[0]), 0), min(up(pair_of[1]), head_dim - 1)
        kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float64) - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.rope_factor)


def yarn_mscale(factor, mscale=1.0):
    """Return 0.1 m ln s + 1, by which YaRN sharpens an attention that sees s times more keys (equation 22 there)."""
    return 0.1 * mscale * math.log(factor) + 1.0


def rope_amplitude(scaling=None):
    """Return the factor on cos and sin: YaRN's, or with both mscales given DeepSeek's quotient, else 1."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    factor, mscale, all_dim = scaling.rope_factor, scaling.rope_mscale, scaling.rope_mscale_all_dim
    return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if mscale and all_dim else yarn_mscale(factor)
