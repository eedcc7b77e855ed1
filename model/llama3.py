"""Llama 3 (Dubey et al. 2024, "The Llama 3 Herd of Models", section 3.2), small.

A dense decoder: pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward.
"""

from dataclasses import dataclass

from torch import nn

from model.basemodel import BaseModel, BaseModelArgs, ModelError
from model.hf.llama3 import layout
from model.layers.attention import attention, cache_append, packed_mask
from model.layers.embedding import Embedding
from model.layers.feed_forward import SwiGLU
from model.layers.loss import lm_loss
from model.layers.norm import RMSNorm
from model.layers.rotary import RopeArgs, Rotary, rotate, token_positions


@dataclass
class Llama3ModelArgs(RopeArgs, BaseModelArgs):
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12
    n_heads: int = 12  # H, query heads
    n_kv_heads: int = 4  # G, key and value heads; each serves H / G query heads
    head_dim: int = 64  # K
    inter_dim: int = 2048  # F, width of the feed-forward
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0  # base of the rotary frequencies
    tie_embeddings: bool = True  # the output head is the embedding table, as in Llama 3.2 1B and 3B

    def __post_init__(self):
        self.check_sizes()
        if self.n_heads % self.n_kv_heads:
            raise ModelError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}: change one")
        if self.head_dim % 2:
            raise ModelError(f"head_dim={self.head_dim} must be even, rotary positions turn pairs: change it")
        self.check_rope()


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, args, layer):
        super().__init__()
        self.layer = layer
        self.head_dim = args.head_dim
        self.q_proj = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.k_proj = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.v_proj = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.o_proj = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x, rope, mask, state):
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, K)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, G, K)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if state is not None:
            k = cache_append(state, self.layer, "k", k)  # (B, S, G, K)
            v = cache_append(state, self.layer, "v", v)
        return self.o_proj(attention(q, k, v, mask).flatten(-2))


class Block(nn.Module):
    def __init__(self, args, layer):
        super().__init__()
        self.attn_norm = RMSNorm(args.dim, args.norm_eps)
        self.attn = Attention(args, layer)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn = SwiGLU(args.dim, args.inter_dim)

    def forward(self, x, rope, mask, state):
        x = x + self.attn(self.attn_norm(x), rope, mask, state)
        return x + self.ffn(self.ffn_norm(x))


class Llama3Model(BaseModel):
    model_name = "mini_llama3"
    hf_layout = layout(Llama3ModelArgs)

    def __init__(self, args):
        super().__init__(args)
        self.tok_embed = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, layer) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.lm_head = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.lm_head.weight = self.tok_embed.weight
        self.rotary = Rotary(args.head_dim, args.max_seq_len, args.rope_theta, args)
        self.init_weights()

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        self.check_length(input_ids)
        positions = token_positions(input_ids, state)
        rope = self.rotary(positions)
        mask = packed_mask(positions, state, doc_ids)

        x = self.tok_embed(input_ids)  # (B, T, D)
        for layer in self.layers:
            x = layer(x, rope, mask, state)
        x = self.norm(x)

        if targets is None:
            if state is not None and state.last_only:
                x = x[:, -1:]
            return self.lm_head(x), None, {}
        squares = [] if self.z_loss else None
        losses = {"loss/ce": lm_loss(x, self.lm_head.weight, targets, squares=squares)}
        if squares:
            losses["loss/z"] = self.z_loss * sum(squares)
        return None, sum(losses.values()), losses
