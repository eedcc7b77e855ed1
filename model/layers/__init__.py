"""Settled layers that architectures share, in plain PyTorch. What is new in a paper belongs in that paper's own file.

Shapes: B batch, T tokens, S keys, D dim, H heads, G kv heads, K head dim, F ffn width, E experts, V vocab.
"""

from model.layers.attention import attention, attention_mask, cache_append, matmul, packed_mask
from model.layers.embedding import Embedding, compute_dtype
from model.layers.feed_forward import SwiGLU
from model.layers.loss import lm_loss
from model.layers.moe import expert_load, expert_swiglu
from model.layers.norm import RMSNorm
from model.layers.rotary import (
    RopeArgs,
    Rotary,
    rope_amplitude,
    rope_frequencies,
    rotate,
    token_positions,
    yarn_mscale,
)
from model.layers.state import State

__all__ = [
    "Embedding",
    "RMSNorm",
    "RopeArgs",
    "Rotary",
    "State",
    "SwiGLU",
    "attention",
    "attention_mask",
    "cache_append",
    "compute_dtype",
    "expert_load",
    "expert_swiglu",
    "lm_loss",
    "matmul",
    "packed_mask",
    "rope_amplitude",
    "rope_frequencies",
    "rotate",
    "token_positions",
    "yarn_mscale",
]
