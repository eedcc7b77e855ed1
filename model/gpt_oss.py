"""gpt-oss (OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card", arXiv 2508.10925, section 2), small.

A pre-norm decoder in which attention over a window and attention over all tokens alternate, each head may attend to
nothing (a learned sink in the denominator of its softmax), and every feed-forward is a mixture of clipped experts.
The card gives no equations: where it is silent, the published code decides.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from model.basemodel import MOE_LOAD, BaseModel, BaseModelArgs, State, require
from model.hf.gpt_oss import layout
from model.layers.attention import matmul
from model.layers.embedding import Embedding
from model.layers.experts import expert_linear, experts
from model.layers.loss import lm_loss
from model.layers.moe import expert_load
from model.layers.norm import RMSNorm
from model.layers.rotary import RopeArgs, Rotary, rotate, token_positions
from model.layers.sink import sink_attention
from model.layers.window import packed_window_mask, window_append, window_mask

WINDOW, FULL = "sliding_attention", "full_attention"  # the two kinds of layer, as published configurations call them
SAMPLED = 16  # the share of the sinks is measured at every 16th query


@dataclass
class GptOssModelArgs(RopeArgs, BaseModelArgs):
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12
    layer_types: tuple[str, ...] = ()  # a kind for each layer; empty = windows and full attention in turn
    window_size: int = 128  # W: a token sees itself and the W - 1 tokens before it
    n_heads: int = 12  # H, query heads
    n_kv_heads: int = 4  # G, key and value heads; each serves H / G query heads
    head_dim: int = 64  # K
    moe_inter_dim: int = 768  # F of one expert
    n_routed_experts: int = 8  # E
    n_activated_experts: int = 2  # A, experts per token; 4 in the published models
    swiglu_alpha: float = 1.702  # slope of the gate: x sigmoid(1.702 x) is nearly GELU (Hendrycks & Gimpel 2016)
    swiglu_limit: float = 7.0  # gate and up are clipped there
    aux_loss_weight: float = 0.01  # alpha, weight of the balance loss
    norm_eps: float = 1e-5
    rope_theta: float = 150000.0  # base of the rotary frequencies
    rope_truncate: bool = False  # YaRN's ramp begins and ends between two pairs
    tie_embeddings: bool = True

    def __post_init__(self):
        self.check_sizes()
        heads, kv_heads = self.n_heads, self.n_kv_heads
        require(heads % kv_heads == 0, f"n_heads={heads} must be a multiple of n_kv_heads={kv_heads}: change one")
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even, rotary positions turn pairs")
        active, most = self.n_activated_experts, self.n_routed_experts
        require(active <= most, f"n_activated_experts={active} must lie in 1..{most}, the n_routed_experts")
        require(self.swiglu_limit > 0, f"swiglu_limit={self.swiglu_limit} must be above 0: change it")
        self.layer_types = tuple(self.layer_types)
        n_types, unknown = len(self.layer_types), set(self.layer_types) - {WINDOW, FULL}
        require(n_types in (0, self.n_layers), f"layer_types has {n_types} entries, n_layers={self.n_layers}: fit one")
        require(not unknown, f"layer_types has {', '.join(sorted(unknown))}: choose from {WINDOW}, {FULL}")
        self.check_rope()

    def kinds(self):
        """Return the kind of each layer."""
        return self.layer_types or tuple((WINDOW, FULL)[layer % 2] for layer in range(self.n_layers))

    def windows(self):
        """Return the window of each layer, None where it sees all tokens before."""
        return [self.window_size if kind == WINDOW else None for kind in self.kinds()]

    @classmethod
    def tiny(cls):
        return cls(
            vocab_size=97, max_seq_len=24, dim=32, n_layers=3, window_size=7, n_heads=4, n_kv_heads=2, head_dim=8,
            moe_inter_dim=20, n_routed_experts=6, n_activated_experts=2, swiglu_limit=2.0, aux_loss_weight=0.01,
        )  # fmt: skip


class Sample(NamedTuple):
    """The queries at which the sinks are measured, {window: keys visible to them}, and which of them are tokens."""

    queries: slice
    masks: dict
    token_mask: torch.Tensor | None


class TokenInfo(NamedTuple):
    """Inputs of every block: cos and sin, {window: visible keys}, token mask (B, T; False = padding), state, sample."""

    rope: tuple
    masks: dict
    token_mask: torch.Tensor | None = None
    state: State | None = None
    sample: Sample | None = None  # while training


class Attention(nn.Module):
    """Grouped-query attention with a sink per head. (B, T, D) -> (B, T, D), the share of the sinks (H,) or None.

    p_ts = exp(s_ts) / (exp(sink) + sum_s' exp(s_ts')): the probabilities of a query sum to less than 1, and where no
    key deserves attention the head adds next to nothing. The sink is a logit without a value.
    """

    def __init__(self, args, layer, window):
        super().__init__()
        self.layer = layer
        self.window = window
        self.head_dim = args.head_dim
        self.q_proj = nn.Linear(args.dim, args.n_heads * args.head_dim)
        self.k_proj = nn.Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.v_proj = nn.Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.o_proj = nn.Linear(args.n_heads * args.head_dim, args.dim)
        self.sinks = nn.Parameter(torch.zeros(args.n_heads))

    def init_weights(self):
        for module in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.zeros_(module.bias)
        nn.init.zeros_(self.sinks)  # exp(0) = 1 in the denominator: "off-by-one" attention

    def forward(self, x, info):
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, K)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, G, K)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = rotate(q, *info.rope), rotate(k, *info.rope)
        share = None if info.sample is None else self._sink_share(q, k, info.sample)
        if info.state is not None:
            k = window_append(info.state, self.layer, "k", k, self.window)  # (B, S, G, K)
            v = window_append(info.state, self.layer, "v", v, self.window)
        out = sink_attention(q, k, v, self.sinks, info.masks[self.window])
        return self.o_proj(out.flatten(-2)), share

    @torch.no_grad()
    def _sink_share(self, q, k, sample):
        """Return the share of the probability that the sinks take (H,): 1 less what attention to values of 1 gives."""
        ones = k.new_ones(*k.shape[:-1], 1)
        of_keys = sink_attention(q[:, sample.queries], k, ones, self.sinks, sample.masks[self.window])
        return token_mean(1 - of_keys.float()[..., 0], sample.token_mask)


class MoEStats(NamedTuple):
    """Of one layer: tokens per expert (E,); while training the mean router probability (E,) and best weight ()."""

    load: torch.Tensor
    probability: torch.Tensor | None = None
    best: torch.Tensor | None = None


class MoE(nn.Module):
    """Experts weighted by a softmax over the chosen ones. (B, T, D) -> (B, T, D), statistics for `MoEStats`.

    An expert is down((up + 1) * gate * sigmoid(alpha * gate)) with gate <= limit and |up| <= limit, all three
    projections with a bias. Clipping keeps outliers small; the "+ 1" passes the gate's part on where up is 0.
    """

    expert_weights = ("gate_proj", "up_proj", "down_proj")
    scalar_params = ("router", "gate_bias", "up_bias", "down_bias")  # rows that are vectors of their own

    def __init__(self, args):
        super().__init__()
        a = self.args = args
        self.router = nn.Parameter(torch.empty(a.n_routed_experts, a.dim))
        self.router_bias = nn.Parameter(torch.zeros(a.n_routed_experts))
        self.gate_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.moe_inter_dim, a.dim))  # (E, F, D)
        self.gate_bias = nn.Parameter(torch.zeros(a.n_routed_experts, a.moe_inter_dim))
        self.up_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.moe_inter_dim, a.dim))
        self.up_bias = nn.Parameter(torch.zeros(a.n_routed_experts, a.moe_inter_dim))
        self.down_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.dim, a.moe_inter_dim))
        self.down_bias = nn.Parameter(torch.zeros(a.n_routed_experts, a.dim))

    def init_weights(self):
        for bias in (self.router_bias, self.gate_bias, self.up_bias, self.down_bias):
            nn.init.zeros_(bias)

    def forward(self, x, info):
        a = self.args
        tokens = x.flatten(0, 1)  # (N, D)
        with torch.autocast(x.device.type, enabled=False):  # routing in fp32: a rounded tie is a different expert
            score = matmul(tokens.float(), self.router.float().T) + self.router_bias.float()  # (N, E)
        top, chosen = score.topk(a.n_activated_experts, dim=-1)  # (N, A), best first
        weight = top.softmax(dim=-1)  # over the chosen: the others' scores do not matter
        out = experts(tokens, chosen, weight, self._expert, a.n_routed_experts).view_as(x)
        load = expert_load(chosen, a.n_routed_experts, info.token_mask)
        if info.state is not None:
            return out, MoEStats(load.float())
        probability = score.softmax(dim=-1).view(*x.shape[:2], -1)
        best = weight[:, 0].detach().view(x.shape[:2])
        return out, MoEStats(load.float(), *(token_mean(p, info.token_mask) for p in (probability, best)))

    def _expert(self, x, e):  # (n, D) -> (n, D)
        limit = self.args.swiglu_limit
        gate = expert_linear(x, self.gate_proj, e, self.gate_bias).clamp(max=limit)
        up = expert_linear(x, self.up_proj, e, self.up_bias).clamp(-limit, limit)
        h = (up + 1) * gate * torch.sigmoid(self.args.swiglu_alpha * gate)
        return expert_linear(h, self.down_proj, e, self.down_bias)


class Block(nn.Module):
    """Attention and experts, each on a normed copy of the stream. (B, T, D) -> (B, T, D), sink share, MoEStats."""

    def __init__(self, args, layer, window):
        super().__init__()
        self.attn_norm = RMSNorm(args.dim, args.norm_eps)
        self.attn = Attention(args, layer, window)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn = MoE(args)

    def forward(self, x, info):
        out, share = self.attn(self.attn_norm(x), info)
        x = x + out
        out, stats = self.ffn(self.ffn_norm(x), info)
        return x + out, share, stats


class GptOssModel(BaseModel):
    model_name = "mini_gpt_oss"
    hf_layout = layout(GptOssModelArgs)

    def __init__(self, args):
        super().__init__(args)
        self.tok_embed = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, layer, window) for layer, window in enumerate(args.windows()))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.lm_head = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.lm_head.weight = self.tok_embed.weight
        self.rotary = Rotary(args.head_dim, args.max_seq_len, args.rope_theta, args)
        self.init_weights()

    def token_info(self, input_ids, state, doc_ids, training):
        positions = token_positions(input_ids, state)
        masks = {window: packed_window_mask(positions, state, doc_ids, window) for window in set(self.args.windows())}
        token_mask = None if doc_ids is None else doc_ids >= 0
        sample = self._sample(positions, input_ids, doc_ids, token_mask) if training and state is None else None
        return TokenInfo(self.rotary(positions), masks, token_mask, state, sample)

    def _sample(self, positions, input_ids, doc_ids, token_mask):
        queries = slice((input_ids.shape[1] - 1) % SAMPLED, None, SAMPLED)  # the last one sees most
        docs = torch.zeros_like(input_ids[:1]) if doc_ids is None else doc_ids
        windows = set(self.args.windows())
        masks = {window: window_mask(positions, None, docs, window)[:, :, queries] for window in windows}
        return Sample(queries, masks, None if token_mask is None else token_mask[:, queries])

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        self.check_length(input_ids)
        info = self.token_info(input_ids, state, doc_ids, training=targets is not None)
        x = self.tok_embed(input_ids)  # (B, T, D)
        shares, stats = [], []
        for layer in self.layers:
            x, share, of_layer = layer(x, info)
            shares.append(share)
            stats.append(of_layer)
        x = self.norm(x)

        other_vars = {MOE_LOAD: torch.stack([s.load for s in stats])}  # (L, E)
        if targets is None:
            if state is not None and state.last_only:
                x = x[:, -1:]
            return self.lm_head(x), None, other_vars
        squares = [] if self.z_loss else None
        other_vars["loss/ce"] = lm_loss(x, self.lm_head.weight, targets, squares=squares)
        if state is None:
            other_vars["loss/balance"] = self._balance_loss(stats)
            other_vars["moe/best_weight"] = torch.stack([s.best for s in stats])  # (L,), 1 / A = undecided
            other_vars |= self._sink_shares(shares)
        if squares:
            other_vars["loss/z"] = self.z_loss * sum(squares)
        return None, sum(term for name, term in other_vars.items() if name.startswith("loss/")), other_vars

    def _balance_loss(self, stats):
        """Auxiliary loss of the Switch Transformer (Fedus et al. 2021, equations 4-6), the mean over the layers.

        alpha E sum_e f_e P_e with the share f_e of a layer's tokens that chose expert e (they sum to A), and the mean
        probability P_e of a softmax over all experts. The published code forms f and P over all layers together,
        which a layer without a balance of its own can satisfy (docs/architectures/gpt_oss.md).
        """
        load = torch.stack([s.load for s in stats])  # (L, E)
        f = load * self.args.n_activated_experts / load.sum(dim=1, keepdim=True).clamp(min=1)
        p = torch.stack([s.probability for s in stats])
        return self.args.aux_loss_weight * self.args.n_routed_experts * (f * p).sum(dim=1).mean()

    def _sink_shares(self, shares):
        """The share of the probability that goes to the sinks: of each head (L, H), and its mean per kind of layer."""
        kinds = {"sink/share_window": [], "sink/share_full": []}
        for share, window in zip(shares, self.args.windows()):
            kinds["sink/share_window" if window else "sink/share_full"].append(share.mean())
        means = {name: torch.stack(of_kind).mean() for name, of_kind in kinds.items() if of_kind}
        return {"sink/share": torch.stack(shares), **means}

    def num_params(self):
        """As for every model; active: without the experts that a token does not choose."""
        a = self.args
        expert = 3 * a.dim * a.moe_inter_dim + 2 * a.moe_inter_dim + a.dim
        counts = super().num_params()
        unchosen = a.n_layers * (a.n_routed_experts - a.n_activated_experts) * expert
        return counts | {"active": counts["total"] - unchosen}

    def attention_flops_per_token(self, seq_len):
        """Return the forward FLOPs of scores and values: 4 S H K per layer, S the tokens that a query may see."""
        seen = sum(min(seq_len, window or seq_len) for window in self.args.windows())
        return 4 * seen * self.args.n_heads * self.args.head_dim


def token_mean(x, token_mask=None):
    """Return the mean over the tokens (...). x (B, T, ...), token_mask (B, T), False = padding."""
    if token_mask is None:
        return x.mean(dim=(0, 1))
    is_token = token_mask.to(x.dtype)
    return torch.einsum("bt...,bt->...", x, is_token) / is_token.sum().clamp(min=1)
