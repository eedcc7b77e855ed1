"""LFM3 (Liquid AI 2026), small: the backbone of the "LFM2 Technical Report" (Amini et al. 2025) with three additions.

From LFM2: most layers mix tokens by a gated short convolution, few by grouped-query attention with normed queries and
keys. New in LFM3, for which the published code is the source: some attention layers see a window only, each head has a
gate (Qiu et al. 2025, "Gated Attention for Large Language Models"), and each sublayer is normed on both sides (Ding et
al. 2021, "CogView", section 2.4).
"""

from dataclasses import dataclass

import torch
from torch import nn

from model.basemodel import BaseModel, BaseModelArgs, require
from model.hf.lfm3 import layout
from model.layers.attention import attention, packed_mask
from model.layers.conv import CausalConv
from model.layers.embedding import Embedding
from model.layers.feed_forward import SwiGLU
from model.layers.loss import lm_loss
from model.layers.norm import RMSNorm
from model.layers.rotary import Rotary, rotate, token_positions
from model.layers.window import packed_window_mask, window_append

KINDS = ("conv", "sliding_attention", "full_attention")
CONV, SLIDING, FULL = KINDS


@dataclass
class Lfm3ModelArgs(BaseModelArgs):
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12
    layer_types: tuple[str, ...] = ()  # conv, sliding_attention or full_attention per layer; empty: as in LFM3-1.7B
    conv_size: int = 7  # k, taps of the convolution: the token itself and the k - 1 before it
    window_size: int = 128  # W, keys that a query of a sliding layer sees, its own among them
    n_heads: int = 12  # H, query heads
    n_kv_heads: int = 4  # G, key and value heads; each serves H / G query heads
    head_dim: int = 64  # K
    inter_dim: int = 2048  # F, width of the feed-forward
    head_gate: bool = True  # a gate on the output of each head
    sandwich_norm: bool = True  # a norm after each sublayer as well, before it is added to the stream
    norm_eps: float = 1e-5
    rope_theta: float = 1000000.0  # base of the rotary frequencies in full layers
    rope_proportion: float = 0.5  # share of the pairs that turn there, those of the highest frequencies
    rope_local_theta: float = 10000.0  # base in sliding layers, where every pair turns
    tie_embeddings: bool = True

    def __post_init__(self):
        self.check_sizes()
        self.layer_types = tuple(self.layer_types)
        n_types, unknown = len(self.layer_types), set(self.layer_types) - set(KINDS)
        require(n_types in (0, self.n_layers), f"layer_types has {n_types} entries, n_layers={self.n_layers}: fit one")
        require(not unknown, f"layer_types has {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
        groups = self.n_kv_heads
        require(self.n_heads % groups == 0, f"n_heads={self.n_heads} must be a multiple of n_kv_heads={groups}")
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: rotary positions turn pairs")
        require(0 <= self.rope_proportion <= 1, f"rope_proportion={self.rope_proportion} must lie in 0..1")

    def kinds(self):
        """Return the kind of each layer: a period of four, which the first layer leaves out."""
        period = (SLIDING, CONV, FULL, CONV)
        return self.layer_types or (CONV, *(period[i % 4] for i in range(1, self.n_layers)))

    @classmethod
    def tiny(cls):
        """Every kind of layer, some pairs that turn and some that do not, windows and taps of odd sizes."""
        return cls(
            vocab_size=97,
            max_seq_len=24,
            dim=32,
            n_layers=5,
            conv_size=4,
            window_size=7,
            n_heads=4,
            n_kv_heads=2,
            head_dim=8,
            inter_dim=48,
        )


class ShortConv(nn.Module):
    """Gated short convolution: y = W_out (C * conv(B * h)) with [B, C, h] = W_in x; no activation, no positions.

    (B, T, D) -> (B, T, D), the share of |weight| of each tap (k,), the token's own last (None while decoding).
    """

    def __init__(self, args, layer):
        super().__init__()
        self.layer = layer
        self.in_proj = nn.Linear(args.dim, 3 * args.dim, bias=False)
        self.conv = CausalConv(args.dim, args.conv_size)
        self.o_proj = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x, rope, mask, state, doc_ids):
        b, c, h = self.in_proj(x).chunk(3, dim=-1)  # (B, T, D) each; b decides what enters, c what leaves
        out = self.o_proj(c * self.conv(b * h, state, self.layer, doc_ids=doc_ids))
        return out, None if state is not None else self._share_of_taps()

    @torch.no_grad()
    def _share_of_taps(self):
        size = self.conv.weight.float().abs().sum(dim=0)
        return size / size.sum()


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys and a gate per head, over all keys or a window of them.

    (B, T, D) -> (B, T, D), how open the gate of each head is on average (H,) (None while decoding).
    """

    def __init__(self, args, layer, window):
        super().__init__()
        self.layer = layer
        self.window = window
        self.head_dim = args.head_dim
        self.q_proj = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.k_proj = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.v_proj = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.o_proj = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        self.q_norm = RMSNorm(args.head_dim, args.norm_eps)  # of each head; bounds the logits
        self.k_norm = RMSNorm(args.head_dim, args.norm_eps)
        self.gate_proj = nn.Linear(args.dim, args.n_heads, bias=False) if args.head_gate else None

    def forward(self, x, rope, mask, state, doc_ids):
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))  # (B, T, H, K)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))  # (B, T, G, K)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if state is not None:
            k = window_append(state, self.layer, "k", k, self.window)  # (B, S, G, K)
            v = window_append(state, self.layer, "v", v, self.window)
        out = attention(q, k, v, mask)  # (B, T, H, K)
        if self.gate_proj is None:
            return self.o_proj(out.flatten(-2)), None
        gate = self.gate_proj(x).sigmoid()  # (B, T, H)
        out = self.o_proj((out * gate[..., None]).flatten(-2))
        return out, None if state is not None else self._open(gate, doc_ids)

    @torch.no_grad()
    def _open(self, gate, doc_ids):
        gate = gate.float()
        if doc_ids is None:
            return gate.mean(dim=(0, 1))
        is_token = (doc_ids >= 0)[..., None]  # padding counts nowhere
        return (gate * is_token).sum(dim=(0, 1)) / is_token.sum().clamp(min=1)


class Block(nn.Module):
    """x + norm(mixer(norm(x))), and the same with the feed-forward. (B, T, D) -> (B, T, D), statistic."""

    def __init__(self, args, layer, kind):
        super().__init__()
        self.mixer_norm = RMSNorm(args.dim, args.norm_eps)
        if kind == CONV:
            self.mixer = ShortConv(args, layer)
        else:
            self.mixer = Attention(args, layer, args.window_size if kind == SLIDING else None)
        self.mixer_post_norm = RMSNorm(args.dim, args.norm_eps) if args.sandwich_norm else nn.Identity()
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn = SwiGLU(args.dim, args.inter_dim)
        self.ffn_post_norm = RMSNorm(args.dim, args.norm_eps) if args.sandwich_norm else nn.Identity()

    def forward(self, x, rope, mask, state, doc_ids):
        mixed, statistic = self.mixer(self.mixer_norm(x), rope, mask, state, doc_ids)
        x = x + self.mixer_post_norm(mixed)
        return x + self.ffn_post_norm(self.ffn(self.ffn_norm(x))), statistic


class Lfm3Model(BaseModel):
    model_name = "mini_lfm3"
    hf_layout = layout(Lfm3ModelArgs)

    def __init__(self, args):
        super().__init__(args)
        self.kinds = args.kinds()
        self.tok_embed = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, layer, kind) for layer, kind in enumerate(self.kinds))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.lm_head = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.lm_head.weight = self.tok_embed.weight
        self.rotary = Rotary(args.head_dim, args.max_seq_len, args.rope_theta, proportion=args.rope_proportion)
        self.local_rotary = Rotary(args.head_dim, args.max_seq_len, args.rope_local_theta)
        self.init_weights()

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        self.check_length(input_ids)
        positions = token_positions(input_ids, state)
        window = packed_window_mask(positions, state, doc_ids, self.args.window_size)
        views = {  # cos and sin, visible keys
            CONV: (None, None),
            SLIDING: (self.local_rotary(positions), window),
            FULL: (self.rotary(positions), packed_mask(positions, state, doc_ids)),
        }
        x = self.tok_embed(input_ids)  # (B, T, D)
        taps, gates = [], []
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            x, statistic = layer(x, *views[kind], state, doc_ids)
            (taps if kind == CONV else gates).append(statistic)
        x = self.norm(x)

        if targets is None:
            if state is not None and state.last_only:
                x = x[:, -1:]
            return self.lm_head(x), None, {}
        squares = [] if self.z_loss else None
        losses = {"loss/ce": lm_loss(x, self.lm_head.weight, targets, squares=squares)}
        if squares:
            losses["loss/z"] = self.z_loss * sum(squares)
        loss = sum(losses.values())
        named = {"conv/taps": taps, "gate/open": gates}  # (layers, k), (layers, H)
        return None, loss, losses | {name: torch.stack(x) for name, x in named.items() if x and x[0] is not None}

    def attention_flops_per_token(self, seq_len):
        """Return the forward FLOPs of scores and values: a sliding layer has at most W keys, a convolution none."""
        keys = {CONV: 0, SLIDING: min(seq_len, self.args.window_size), FULL: seq_len}
        return 4 * self.args.n_heads * self.args.head_dim * sum(keys[kind] for kind in self.kinds)
