"""Settled layers that architectures share, in plain PyTorch. What is new in a paper belongs in that paper's own file.

Shapes: B batch, T tokens, S keys, D dim, H heads, G kv heads, K head dim, F ffn width, E experts, V vocab.
"""

from model.layers.attention import attention, attention_mask, cache_append, matmul, packed_mask
from model.layers.conv import CausalConv
from model.layers.embedding import Embedding, compute_dtype
from model.layers.experts import expert_linear, experts
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
from model.layers.sink import sink_attention
from model.layers.state import State
from model.layers.window import packed_window_mask, recent, window_append, window_mask

__all__ = [
    "CausalConv",
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
    "expert_linear",
    "expert_load",
    "expert_swiglu",
    "experts",
    "lm_loss",
    "matmul",
    "packed_mask",
    "packed_window_mask",
    "recent",
    "rope_amplitude",
    "rope_frequencies",
    "rotate",
    "sink_attention",
    "token_positions",
    "window_append",
    "window_mask",
    "yarn_mscale",
]
