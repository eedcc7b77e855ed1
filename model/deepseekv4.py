"""DeepSeek-V4 (DeepSeek-AI 2026, "DeepSeek-V4: Towards Highly Efficient Million-Token Context Intelligence"), small.

Section 2: DeepSeekMoE, whose first layers choose experts by a table of token ids (2.1); a residual stream of n_hc
parts, which manifold-constrained hyper-connections read, mix and write (2.2); attention to the last tokens and to
compressed entries of all earlier ones: an indexer chooses among many (CSA, 2.3.1), or few are all seen (HCA, 2.3.2).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.basemodel import MOE_LOAD, BaseModel, BaseModelArgs, State, require
from model.hf.deepseekv4 import layout
from model.layers.attention import matmul
from model.layers.compressed import entry_append, find_windows
from model.layers.embedding import Embedding
from model.layers.experts import expert_linear, experts
from model.layers.loss import lm_loss
from model.layers.moe import expert_load
from model.layers.norm import RMSNorm
from model.layers.rotary import RopeArgs, Rotary, rotate, token_positions
from model.layers.routing import balance_loss, token_table
from model.layers.sink import sink_attention, sink_attention_sums
from model.layers.window import recent, window_append, window_mask

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


@dataclass
class DeepSeekV4ModelArgs(RopeArgs, BaseModelArgs):
    dim: int = 768  # D, width of each residual stream
    n_layers: int = 12
    layer_types: tuple[str, ...] = ()  # for each layer one of the three; empty: two sliding, then CSA, HCA in turn
    n_heads: int = 12  # H, query heads; there is one head of keys, which are the values as well
    head_dim: int = 64  # K
    qk_rope_head_dim: int = 16  # elements of a head with rotary positions
    q_lora_rank: int = 256  # d_c, rank of the query latent, which the indexer reads too
    o_groups: int = 4  # g, groups of heads in the output projection
    o_lora_rank: int = 96  # d_g, rank per group
    window_size: int = 128  # n_win, tokens that every layer sees uncompressed, the query's own included
    csa_ratio: int = 4  # m, tokens per entry
    hca_ratio: int = 32  # m'
    index_n_heads: int = 4
    index_head_dim: int = 32  # c^I
    index_topk: int = 32  # k, entries of CSA that a query sees
    index_loss_weight: float = 1.0  # of the indexer's KL; 0 freezes the indexer
    hc_mult: int = 4  # n_hc, residual streams
    hc_iters: int = 20  # t_max of Sinkhorn-Knopp
    hc_eps: float = 1e-6
    n_hash_layers: int = 3  # the first layers choose experts by a table
    moe_inter_dim: int = 512  # F of one expert, and of the one that every token uses
    n_routed_experts: int = 8  # E
    n_activated_experts: int = 2  # A, routed experts per token
    route_scale: float = 1.5  # factor on the routed experts' weights
    swiglu_limit: float = 10.0  # bound of the factors inside an expert
    bias_update_speed: float = 0.001  # step of the routing bias
    seq_aux_alpha: float = 0.0001  # weight of the sequence-wise balance loss
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0  # of sliding layers
    compress_rope_theta: float = 160000.0  # of layers with entries; rope_type and its factors are theirs as well
    tie_embeddings: bool = True

    def __post_init__(self):
        self.check_sizes("n_hash_layers")
        rope, width = self.qk_rope_head_dim, min(self.head_dim, self.index_head_dim)
        require({*self.layer_types} <= {SLIDING, CSA, HCA}, f"layer_types: choose among {SLIDING}, {CSA} and {HCA}")
        require(len(self.layer_types) in (0, self.n_layers), f"layer_types must have n_layers={self.n_layers} entries")
        require(self.n_heads % self.o_groups == 0, f"n_heads={self.n_heads} is no multiple of o_groups={self.o_groups}")
        require(self.n_activated_experts <= self.n_routed_experts, "n_activated_experts is above n_routed_experts")
        require(rope % 2 == 0 and rope <= width, f"qk_rope_head_dim={rope} must be even and at most {width}: change it")
        if self.rope_type == "yarn":  # here it scales neither cos and sin nor the scores
            self.rope_mscale = self.rope_mscale_all_dim = 1.0
        self.check_rope()

    @classmethod
    def tiny(cls):
        attention = dict(n_heads=4, head_dim=8, qk_rope_head_dim=4, q_lora_rank=20, o_groups=2, o_lora_rank=6)
        entries = dict(window_size=5, csa_ratio=2, hca_ratio=3, index_n_heads=8, index_head_dim=6, index_topk=3)
        others = dict(moe_inter_dim=20, n_routed_experts=6, n_hash_layers=1, hc_mult=2, hc_iters=4)
        return cls(vocab_size=97, max_seq_len=24, dim=32, n_layers=3, **attention, **entries, **others)

    def kinds(self):
        """Return the kind of attention of each layer."""
        n_sliding = 2 if self.n_layers > 3 else 1
        return self.layer_types or ((SLIDING,) * n_sliding + (CSA, HCA) * self.n_layers)[: self.n_layers]


class TokenInfo(NamedTuple):
    """Inputs of every block. The dicts are by the kind of a layer's attention."""

    ids: torch.Tensor  # (B, T)
    rope: dict  # cos and sin of the tokens
    mask: torch.Tensor  # (B, 1, T, S) bool: the uncompressed tokens that each token sees
    windows: dict  # the compressed ones, `Windows`
    token_mask: torch.Tensor | None  # (B, T), False = padding
    state: State | None
    training: bool  # whether there are targets


class MoE(nn.Module):
    """DeepSeekMoE (2.1) as in V3, with affinities sqrt(softplus(.)). (B, T, D) -> (B, T, D), {statistics}.

    The first layers look up a token's experts in a fixed table (Roller et al. 2021), and learn their weights only.
    """

    expert_weights = ("gate_proj", "up_proj", "down_proj")
    scalar_params = ("router",)  # each row is a vector of its own, not a map of the stream

    def __init__(self, args, layer):
        super().__init__()
        a = self.args = args
        self.router = nn.Parameter(torch.empty(a.n_routed_experts, a.dim))
        sizes = a.vocab_size, a.n_activated_experts, a.n_routed_experts
        self.register_buffer("table", token_table(*sizes) if layer < a.n_hash_layers else None)  # (V, A)
        self.register_buffer("routing_bias", torch.zeros(a.n_routed_experts) if self.table is None else None)
        self.gate_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.moe_inter_dim, a.dim))  # (E, F, D)
        self.up_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.moe_inter_dim, a.dim))
        self.down_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.dim, a.moe_inter_dim))
        shared = {"gate_proj": (a.dim, a.moe_inter_dim), "up_proj": (a.dim, a.moe_inter_dim)}
        shared["down_proj"] = a.moe_inter_dim, a.dim
        self.shared = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in shared.items()})

    def forward(self, x, info):
        a, shared, tokens = self.args, self.shared, x.flatten(0, 1)  # (N, D)
        with torch.autocast(x.device.type, enabled=False):  # routing in fp32: a rounded tie is a different expert
            logits = matmul(tokens.float(), self.router.float().T)
            affinity = F.softplus(logits.clamp(min=-80)).sqrt()  # (N, E); below -80 the gradient would be 0 / 0
        if self.table is not None:
            chosen = self.table[info.ids.flatten()]  # (N, A)
        else:
            chosen = (affinity.detach() + self.routing_bias).topk(a.n_activated_experts, sorted=False).indices
        weight = affinity.gather(1, chosen)
        weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20) * a.route_scale

        def clipped(gate, up):
            return F.silu(gate.clamp(max=a.swiglu_limit)) * up.clamp(-a.swiglu_limit, a.swiglu_limit)

        def expert(x, e):
            h = clipped(expert_linear(x, self.gate_proj, e), expert_linear(x, self.up_proj, e))
            return expert_linear(h, self.down_proj, e)

        out = experts(tokens, chosen, weight, expert, a.n_routed_experts).view_as(x)
        out = out + shared["down_proj"](clipped(shared["gate_proj"](x), shared["up_proj"](x)))
        load = expert_load(chosen, a.n_routed_experts, info.token_mask).float()
        if self.table is not None or not info.training:
            return out, {MOE_LOAD: load}
        balance = balance_loss(affinity.view(*x.shape[:2], -1), a.n_activated_experts, info.token_mask)
        return out, {MOE_LOAD: load, "loss/balance": a.seq_aux_alpha * balance}


class StreamMap(nn.Module):
    """Coefficients scale * W x + bias of the streams x of a token, normed together. (B, T, n, D) -> (B, T, n_out)."""

    def __init__(self, args, bias):
        super().__init__()
        self.norm_eps, self.eps = args.norm_eps, args.hc_eps
        self.proj = nn.Parameter(torch.empty(len(bias), args.hc_mult * args.dim))
        self.bias = nn.Parameter(bias)
        self.scale = nn.Parameter(torch.full((1,), 0.01))

    def forward(self, x):
        x = x.flatten(-2).float()
        with torch.autocast(x.device.type, enabled=False):
            x = F.linear(F.rms_norm(x, x.shape[-1:], eps=self.norm_eps), self.proj.float())
        return self.scale * x + self.bias

    def read(self, x):
        """Return the sum of the streams, weighted by the sigmoid of the coefficients. (B, T, n, D) -> (B, T, D)."""
        return matmul((self(x).sigmoid() + self.eps).to(x.dtype)[..., None, :], x)[..., 0, :]


class HyperConnection(nn.Module):
    """How a sublayer f reads, mixes and writes the streams X (n, D): X' = B X + C f(A X) (2.2, equations 1-8).

    A in (0, 1), B doubly stochastic, C in (0, 2). They start near a plain residual: read one, write all, mix none.
    """

    def __init__(self, args, sublayer):
        super().__init__()
        n = args.hc_mult
        self.n_iters, self.eps = args.hc_iters, args.hc_eps
        self.pre = StreamMap(args, 6.0 * (torch.arange(n) == sublayer % n) - 3)
        self.post = StreamMap(args, torch.zeros(n))
        self.res = StreamMap(args, (6 * torch.eye(n) - 3).flatten())
        for unused in (self.pre, self.res) if sublayer == 0 else ():  # the streams are still copies of one
            unused.requires_grad_(False)

    def write(self, x, out):
        """Return the streams after a sublayer with output `out` (B, T, D), and the share that it mixes, 0-d."""
        c = 2 * self.post(x).sigmoid()
        b = self.res(x).unflatten(-1, (x.shape[-2], -1)).softmax(dim=-1) + self.eps  # (B, T, from n, to n)
        for i in range(2 * self.n_iters - 1):  # Sinkhorn-Knopp: columns, rows, columns ...
            b = b / (b.sum(dim=i % 2 - 2, keepdim=True) + self.eps)
        x = torch.addcmul(matmul(b.mT.to(x.dtype), x), c.to(x.dtype)[..., None], out[..., None, :].to(x.dtype))
        return x, 1 - b.detach().diagonal(dim1=-2, dim2=-1).mean()


class Compressor(nn.Module):
    """Windows of m tokens as one entry each: sums weighted per channel. (B, T, D) -> (B, S, dim), all of the state.

    HCA: equations 20-23. CSA, 9-12: two values per token, C^b for the entry of its own window and C^a for the next one.
    """

    scalar_params = ("position_bias",)
    not_quantized = ("kv_proj", "gate_proj")

    def __init__(self, args, layer, name, dim, overlap):
        super().__init__()
        self.layer, self.name, self.n_values = layer, name, 1 + overlap
        ratio = self.ratio = args.csa_ratio if overlap else args.hca_ratio
        self.kv_proj = nn.Linear(args.dim, self.n_values * dim, bias=False)  # W^aKV, W^bKV
        self.gate_proj = nn.Linear(args.dim, self.n_values * dim, bias=False)  # W^aZ, W^bZ
        self.position_bias = nn.Parameter(torch.empty(self.n_values * ratio, dim))  # B^a, B^b
        self.norm = RMSNorm(dim, args.norm_eps)

    def forward(self, x, windows, state):
        values = torch.cat((self.kv_proj(x), self.gate_proj(x)), dim=-1).unflatten(-1, (2, self.n_values, -1))
        place = torch.arange(self.n_values * self.ratio, device=x.device)  # of a token in an entry
        values = recent(state, self.layer, f"{self.name}_inputs", values, len(place) - 1)
        token = (windows.last[..., None] + place).clamp(max=values.shape[1] - 1)  # (B, N, 2 m | m)
        sequence = torch.arange(len(x), device=x.device)[:, None, None]
        kv, gate = values[sequence, token, :, place // self.ratio].unbind(dim=-2)  # (B, N, 2 m | m, dim)
        gate = gate.float() + self.position_bias.float()
        if self.n_values == 2:  # the first window has none before it
            missing = (windows.number == 0)[..., None] & (place < self.ratio)
            gate = gate.masked_fill(missing[..., None], float("-inf"))
        entries = self.norm((kv * gate.softmax(dim=2).to(kv.dtype)).sum(dim=2))  # (B, N, dim)
        entries = rotate(entries[:, :, None], *windows.rope)[:, :, 0]
        return entry_append(state, self.layer, self.name, entries, windows, self.ratio)


class Indexer(nn.Module):
    """The lightning indexer of CSA scores its entries: I_ts = sum_h w_th relu(q_th k_s) (equations 13-17).

    It learns from its own loss alone, and nothing else does: inputs and target are detached (2512.02556, 2.1).
    """

    not_quantized = ("weight_proj",)

    def __init__(self, args, layer):
        super().__init__()
        self.args = args
        self.compressor = Compressor(args, layer, "index", args.index_head_dim, overlap=True)
        self.q_proj = nn.Linear(args.q_lora_rank, args.index_n_heads * args.index_head_dim, bias=False)  # W^IUQ
        self.weight_proj = nn.Linear(args.dim, args.index_n_heads, bias=False)  # W^w
        self.requires_grad_(args.index_loss_weight > 0)

    def forward(self, x, q_latent, info):
        """Return the scores (B, T, S) of all entries and which of the visible ones are among the best k."""
        a, x, q_latent, windows = self.args, x.detach(), q_latent.detach(), info.windows[CSA]
        keys = self.compressor(x, windows, info.state)  # (B, S, c)
        q = rotate(self.q_proj(q_latent).unflatten(-1, (a.index_n_heads, -1)), *info.rope[CSA])  # (B, T, H, c)
        weight = self.weight_proj(x).float() * (a.index_n_heads * a.index_head_dim) ** -0.5
        with torch.autocast(x.device.type, enabled=False):
            scores = matmul(q.flatten(1, 2).float(), keys.float().mT).relu().unflatten(1, (-1, a.index_n_heads))
            scores = matmul(weight[..., None, :], scores)[..., 0, :]
        ranked = scores.detach().masked_fill(~windows.visible, float("-inf"))
        order = ranked.sort(dim=-1, descending=True, stable=True).indices  # of equal ones the first
        best = torch.arange(order.shape[-1], device=x.device).expand_as(order) < a.index_topk
        return scores, torch.zeros_like(best).scatter(-1, order, best) & windows.visible

    @staticmethod
    def loss(scores, chosen, p, token_mask):
        """Return KL(p || softmax of the scores) over the chosen entries (B, T, S), mean over the tokens."""
        p = p / p.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        none = ~chosen.any(dim=-1, keepdim=True)  # a row of -inf would be NaN
        log_p = scores.masked_fill(~(chosen | none), float("-inf")).log_softmax(dim=-1).masked_fill(~chosen, 0.0)
        kl = (torch.special.xlogy(p, p) - p * log_p).sum(dim=-1)  # (B, T)
        return kl.mean() if token_mask is None else (kl * token_mask).sum() / token_mask.sum().clamp(min=1)


class Attention(nn.Module):
    """One softmax over the last tokens, the entries and a sink (2.3). (B, T, D) -> (B, T, D), {statistics}.

    Keys, one head for all queries, are values too, and therefore rotated: the output is rotated back by its position.
    """

    def __init__(self, args, layer):
        super().__init__()
        a = self.args = args
        self.layer, self.kind = layer, a.kinds()[layer]
        self.q_a_proj = nn.Linear(a.dim, a.q_lora_rank, bias=False)  # W^DQ
        self.q_a_norm = RMSNorm(a.q_lora_rank, a.norm_eps)
        self.q_b_proj = nn.Linear(a.q_lora_rank, a.n_heads * a.head_dim, bias=False)  # W^UQ
        self.kv_proj = nn.Linear(a.dim, a.head_dim, bias=False)
        self.kv_norm = RMSNorm(a.head_dim, a.norm_eps)
        self.sinks = nn.Parameter(torch.zeros(a.n_heads))
        self.o_a_proj = nn.Parameter(torch.empty(a.o_groups, a.o_lora_rank, a.n_heads // a.o_groups * a.head_dim))
        self.o_proj = nn.Linear(a.o_groups * a.o_lora_rank, a.dim, bias=False)
        if self.kind != SLIDING:
            self.compressor = Compressor(a, layer, "entries", a.head_dim, overlap=self.kind == CSA)
        self.indexer = Indexer(a, layer) if self.kind == CSA else None

    def forward(self, x, info):
        a, (cos, sin), mask, stats = self.args, info.rope[self.kind], info.mask, {}
        q_latent = self.q_a_norm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).unflatten(-1, (a.n_heads, -1))  # (B, T, H, K)
        q = rotate(F.rms_norm(q, (a.head_dim,), eps=a.norm_eps), cos, sin)
        keys = rotate(self.kv_norm(self.kv_proj(x))[:, :, None], cos, sin)  # (B, T, 1, K)
        if info.state is not None:
            keys = window_append(info.state, self.layer, "kv", keys, a.window_size)
        if self.kind != SLIDING:
            chosen = info.windows[self.kind].visible
            if self.indexer is not None:
                scores, chosen = self.indexer(x, q_latent, info)
            entries = self.compressor(x, info.windows[self.kind], info.state)  # (B, S, K)
            keys = torch.cat((keys, entries[:, :, None].to(keys.dtype)), dim=1)
            mask = torch.cat([part.expand(len(x), *part.shape[1:]) for part in (mask, chosen[:, None])], dim=-1)
        if self.indexer is not None and info.training:  # p: a head that looks at window or sink counts for less
            p = sink_attention_sums(q, keys, self.sinks, mask, a.head_dim**-0.5)[..., -chosen.shape[-1] :]
            kl, share = self.indexer.loss(scores, chosen, p, info.token_mask), p.sum(dim=-1).mean() / a.n_heads
            stats = {"loss/index": a.index_loss_weight * kl, "index/kl": kl, "index/share": share}
        out = sink_attention(q, keys, keys, self.sinks, mask, a.head_dim**-0.5)
        out = rotate(out, cos, -sin).unflatten(2, (a.o_groups, -1)).flatten(-2)  # (B, T, g, H / g K)
        return self.o_proj(torch.einsum("btgc,grc->btgr", out, self.o_a_proj.to(out.dtype)).flatten(-2)), stats


class Block(nn.Module):
    """Attention and experts, each between hyper-connections. (B, T, n, D) -> the same, {statistics}."""

    def __init__(self, args, layer):
        super().__init__()
        self.attn_hc, self.ffn_hc = HyperConnection(args, 2 * layer), HyperConnection(args, 2 * layer + 1)
        self.attn_norm, self.ffn_norm = RMSNorm(args.dim, args.norm_eps), RMSNorm(args.dim, args.norm_eps)
        self.attn, self.ffn = Attention(args, layer), MoE(args, layer)

    def forward(self, x, info):
        out, of_attn = self.attn(self.attn_norm(self.attn_hc.pre.read(x)), info)
        x, attn_mixed = self.attn_hc.write(x, out)
        out, of_ffn = self.ffn(self.ffn_norm(self.ffn_hc.pre.read(x)), info)
        x, ffn_mixed = self.ffn_hc.write(x, out)
        return x, {**of_attn, **of_ffn, "streams/mixed": torch.stack((attn_mixed, ffn_mixed))}


class DeepSeekV4Model(BaseModel):
    model_name = "mini_deepseekv4"
    hf_layout = layout(DeepSeekV4ModelArgs)

    def __init__(self, args):
        super().__init__(args)
        self.tok_embed = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, i) for i in range(args.n_layers))
        self.hc_head = StreamMap(args, torch.zeros(args.hc_mult))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.lm_head = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.lm_head.weight = self.tok_embed.weight
        self.rotary = Rotary(args.qk_rope_head_dim, args.max_seq_len, args.rope_theta)
        self.compress_rotary = Rotary(args.qk_rope_head_dim, args.max_seq_len, args.compress_rope_theta, args)
        self.init_weights()

    def token_info(self, ids, training, state=None, doc_ids=None):
        a, positions = self.args, token_positions(ids, state)
        rope = {SLIDING: self.rotary(positions)} | dict.fromkeys((CSA, HCA), self.compress_rotary(positions))
        mask = window_mask(positions, state, doc_ids, a.window_size)
        if mask is None:  # plain causal
            mask = (positions[:, :, None] >= positions[:1, None])[:1, None]
        ratios = {CSA: a.csa_ratio, HCA: a.hca_ratio}
        windows = {k: find_windows(positions, m, self.compress_rotary, state, doc_ids) for k, m in ratios.items()}
        return TokenInfo(ids, rope, mask, windows, None if doc_ids is None else doc_ids >= 0, state, training)

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        self.check_length(input_ids)
        info = self.token_info(input_ids, targets is not None, state, doc_ids)
        x = self.tok_embed(input_ids)[:, :, None].expand(-1, -1, self.args.hc_mult, -1)  # (B, T, n, D)
        stats = {}  # {name: one value per layer that has it}
        for layer in self.layers:
            x, of_layer = layer(x, info)
            stats |= {name: [*stats.get(name, ()), value] for name, value in of_layer.items()}
        x = x[:, -1:] if state is not None and state.last_only else x
        x = self.norm(self.hc_head.read(x))  # (B, T, D)
        losses = {name: sum(stats.pop(name)) for name in [*stats] if name.startswith("loss/")}
        other_vars = {name: torch.stack(values).detach() for name, values in stats.items()}
        if targets is None:
            return self.lm_head(x), None, other_vars
        squares = [] if self.z_loss else None
        losses["loss/ce"] = lm_loss(x, self.lm_head.weight, targets, squares=squares)
        if squares:
            losses["loss/z"] = self.z_loss * sum(squares)
        return None, sum(losses.values()), other_vars | losses

    def after_step(self, other_vars):
        """Move every routing bias: up for an expert below the mean load of the step, down for one above it."""
        for layer, load in [*zip(self.layers, other_vars.get(MOE_LOAD, ()))][self.args.n_hash_layers :]:
            layer.ffn.routing_bias += self.args.bias_update_speed * (load.mean() - load).sign()

    def num_params(self):
        """As for every model; active: without the experts that a token does not choose."""
        a, counts = self.args, super().num_params()
        unchosen = (a.n_routed_experts - a.n_activated_experts) * 3 * a.dim * a.moe_inter_dim
        return counts | {"active": counts["total"] - a.n_layers * unchosen}

    def attention_flops_per_token(self, seq_len):
        """Return the forward FLOPs of scores and values over tokens and entries; all else is about 1%."""
        entries = {SLIDING: 0, CSA: -(-seq_len // self.args.csa_ratio), HCA: -(-seq_len // self.args.hca_ratio)}
        return 4 * self.args.n_heads * self.args.head_dim * sum(seq_len + entries[kind] for kind in self.args.kinds())
