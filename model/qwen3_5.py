"""Qwen3.5 (Qwen Team 2026), small: a hybrid of linear and softmax attention, dense or with experts.

Of four layers, three mix tokens by Gated DeltaNet (Yang et al. 2024, "Gated Delta Networks", 2412.06464) and one by
gated attention (Qiu et al. 2025, "Gated Attention for Large Language Models", 2505.06708). The feed-forward is SwiGLU
or experts with a gated shared one. Norms are zero-centred. A further token is predicted as in DeepSeek-V3 (2412.19437,
section 2.2). There is no report of the whole: where the papers are silent, the published code decides.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.basemodel import MOE_LOAD, BaseModel, BaseModelArgs, State, require
from model.hf.qwen3_5 import layout
from model.layers.attention import attention, cache_append, matmul, packed_mask
from model.layers.conv import CausalConv
from model.layers.embedding import Embedding
from model.layers.feed_forward import SwiGLU
from model.layers.loss import lm_loss
from model.layers.moe import expert_load, expert_swiglu
from model.layers.norm import RMSNorm, rms_norm
from model.layers.recurrence import delta_rule, recurrence_flops
from model.layers.rotary import RopeArgs, Rotary, rotate, token_positions

LINEAR, FULL = "linear_attention", "full_attention"


@dataclass
class Qwen3_5ModelArgs(RopeArgs, BaseModelArgs):
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12
    layer_types: tuple[str, ...] = ()  # linear_attention, full_attention; may repeat; empty: 3 linear, 1 full
    linear_n_k_heads: int = 6  # heads of Gated DeltaNet: each key head serves consecutive value heads
    linear_n_v_heads: int = 12  # H
    linear_k_head_dim: int = 64  # K, d_k
    linear_v_head_dim: int = 64  # V, d_v
    conv_size: int = 4  # tokens that the convolution before Gated DeltaNet sees
    chunk_size: int = 64  # C, tokens that the recurrence takes at once: speed alone
    n_heads: int = 12  # H of gated attention
    n_kv_heads: int = 2  # G; each serves H / G query heads
    head_dim: int = 64  # K of gated attention
    qk_rope_head_dim: int = 16  # its first channels, which have rotary positions
    inter_dim: int = 2048  # F of a dense feed-forward, without experts
    n_routed_experts: int = 8  # E; 0: a dense feed-forward in every layer
    n_activated_experts: int = 2  # A, routed experts per token
    moe_inter_dim: int = 512  # F of one expert
    shared_inter_dim: int = 512  # F of the shared expert
    aux_loss_weight: float = 0.001  # alpha, weight of the balance loss
    n_mtp_layers: int = 1  # 1: a module that predicts the token after the next
    mtp_loss_weight: float = 0.3  # lambda
    norm_eps: float = 1e-6
    rope_theta: float = 10000000.0
    tie_embeddings: bool = True

    def __post_init__(self):
        self.check_sizes("n_routed_experts", "n_mtp_layers")
        heads, groups = self.n_heads, self.n_kv_heads
        require(heads % groups == 0, f"n_heads={heads} must be a multiple of n_kv_heads={groups}: change one")
        heads, groups = self.linear_n_v_heads, self.linear_n_k_heads
        require(heads % groups == 0, f"linear_n_v_heads={heads} must be a multiple of linear_n_k_heads={groups}")
        rotary = self.qk_rope_head_dim
        fits = rotary % 2 == 0 and rotary <= self.head_dim
        require(fits, f"qk_rope_head_dim={rotary} must be even, and at most head_dim={self.head_dim}")
        active, experts = self.n_activated_experts, self.n_routed_experts
        require(not experts or active <= experts, f"n_activated_experts={active} must lie in 1..{experts}")
        require(self.n_mtp_layers <= 1, f"n_mtp_layers={self.n_mtp_layers}: the architecture has 0 or 1")
        types = tuple(self.layer_types) or self._usual()
        require({*types} <= {LINEAR, FULL}, f"layer_types={','.join(types)}: choose {LINEAR} or {FULL}")
        repeated, rest = divmod(self.n_layers, len(types))
        require(rest == 0, f"n_layers={self.n_layers} must be a multiple of the {len(types)} entries of layer_types")
        self.layer_types = () if types * repeated == self._usual() else types * repeated
        self.check_rope()

    @property
    def mixers(self):
        """The kind of each layer."""
        return self.layer_types or self._usual()

    def _usual(self):
        return tuple(FULL if i % 4 == 3 else LINEAR for i in range(self.n_layers))

    @classmethod
    def tiny(cls):
        heads = {"linear_n_k_heads": 2, "linear_n_v_heads": 4, "linear_k_head_dim": 8, "linear_v_head_dim": 6}
        attention = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "qk_rope_head_dim": 4}
        experts = {"n_routed_experts": 6, "n_activated_experts": 2, "moe_inter_dim": 20, "shared_inter_dim": 14}
        sizes = {"vocab_size": 97, "max_seq_len": 24, "dim": 32, "n_layers": 3, "inter_dim": 48, "conv_size": 3}
        # a large epsilon: where a memory returns little, the norm enlarges its rounding
        others = {"layer_types": (LINEAR, LINEAR, FULL), "chunk_size": 8, "norm_eps": 0.05}
        return cls(**sizes, **heads, **attention, **experts, **others)


class TokenInfo(NamedTuple):
    """Inputs of every block: cos and sin, visible keys, documents (B, T), token mask (B, T; False = padding), state."""

    rope: tuple
    mask: torch.Tensor | None = None
    doc_ids: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None
    state: State | None = None

    def mean(self, x):
        """Mean over the tokens that are no padding, without a graph. (B, T, N) -> (N,)."""
        mask = x.new_ones(x.shape[:2]) if self.token_mask is None else self.token_mask
        return (x.detach() * mask[:, :, None]).sum(dim=(0, 1)) / mask.sum().clamp(min=1)


class ZeroCentredRMSNorm(nn.Module):
    """RMSNorm by 1 + weight: weight decay pulls the scale to 1. (..., D) -> same."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return rms_norm(x, (1 + self.weight).to(x.dtype), self.eps)


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet (2412.06464, section 3.4 and equation 10). (B, T, D) -> (B, T, D), {name: statistics (H,)}.

    Each head has a matrix S (K, V) as its memory, fades it by alpha_t, and replaces in it the value of key k_t by v_t:

        S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)
    """

    not_quantized = ("a_proj", "b_proj")  # a rounded decay is taken to the power of the distance

    def __init__(self, args, layer):
        super().__init__()
        a = self.args = args
        self.layer = layer
        k_dim, v_dim = a.linear_n_k_heads * a.linear_k_head_dim, a.linear_n_v_heads * a.linear_v_head_dim
        self.sizes = (k_dim, k_dim, v_dim)
        self.qkv_proj = nn.Linear(a.dim, sum(self.sizes), bias=False)
        self.conv = CausalConv(sum(self.sizes), a.conv_size)
        self.z_proj = nn.Linear(a.dim, v_dim, bias=False)  # the output gate
        self.a_proj = nn.Linear(a.dim, a.linear_n_v_heads, bias=False)  # the decay
        self.b_proj = nn.Linear(a.dim, a.linear_n_v_heads, bias=False)  # beta
        self.A_log = nn.Parameter(torch.empty(a.linear_n_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(a.linear_n_v_heads))
        self.norm = RMSNorm(a.linear_v_head_dim, a.norm_eps)
        self.o_proj = nn.Linear(v_dim, a.dim, bias=False)

    def init_weights(self):
        """Decays of Mamba-2 (2405.21060): A uniform in 1..16, time steps log-uniform in 0.001..0.1."""
        nn.init.uniform_(self.A_log, 1, 16).data.log_()
        step = nn.init.uniform_(self.dt_bias, math.log(0.001), math.log(0.1)).data.exp_()
        step.add_(torch.log(-torch.expm1(-step)))  # now softplus(dt_bias) is the step

    def forward(self, x, info):
        a, state = self.args, info.state
        qkv = F.silu(self.conv(self.qkv_proj(x), state, self.layer, doc_ids=info.doc_ids))
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = (unit(t.unflatten(-1, (a.linear_n_k_heads, -1)).float()) for t in (q, k))  # (B, T, G, K)
        v = v.unflatten(-1, (a.linear_n_v_heads, -1))  # (B, T, H, V)
        log_alpha = -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias.float())
        beta = self.b_proj(x).float().sigmoid()  # (B, T, H)
        memory = None if state is None else state.layers[self.layer].get("memory")
        out, memory = delta_rule(q * q.shape[-1] ** -0.5, k, v, log_alpha, beta, memory, info.doc_ids, a.chunk_size)
        if state is not None:
            state.layers[self.layer]["memory"] = memory  # (B, H, K, V)
        gate = F.silu(self.z_proj(x)).unflatten(-1, (a.linear_n_v_heads, -1))
        out = self.o_proj((self.norm(out).to(x.dtype) * gate).flatten(-2))
        if state is not None:
            return out, {}
        return out, {"gdn/decay": info.mean(log_alpha.exp()), "gdn/beta": info.mean(beta)}


def unit(x):
    """Vectors of length 1, with the published epsilon."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


class GatedAttention(nn.Module):
    """Grouped-query attention whose output is gated by element (2505.06708, section 3). Returns as `GatedDeltaNet`.

    Queries and keys are normed by head, and their first channels have rotary positions.
    """

    def __init__(self, args, layer):
        super().__init__()
        a = self.args = args
        self.layer = layer
        self.q_proj = nn.Linear(a.dim, a.n_heads * a.head_dim, bias=False)
        self.gate_proj = nn.Linear(a.dim, a.n_heads * a.head_dim, bias=False)
        self.k_proj = nn.Linear(a.dim, a.n_kv_heads * a.head_dim, bias=False)
        self.v_proj = nn.Linear(a.dim, a.n_kv_heads * a.head_dim, bias=False)
        self.q_norm = ZeroCentredRMSNorm(a.head_dim, a.norm_eps)
        self.k_norm = ZeroCentredRMSNorm(a.head_dim, a.norm_eps)
        self.o_proj = nn.Linear(a.n_heads * a.head_dim, a.dim, bias=False)

    def forward(self, x, info):
        q, k, v = (p(x).unflatten(-1, (-1, self.args.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *info.rope), rotate(self.k_norm(k), *info.rope)  # (B, T, H, K), (B, T, G, K)
        if info.state is not None:
            k = cache_append(info.state, self.layer, "k", k)  # (B, S, G, K)
            v = cache_append(info.state, self.layer, "v", v)
        gate = self.gate_proj(x).sigmoid()
        out = self.o_proj(attention(q, k, v, info.mask).flatten(-2) * gate)
        if info.state is not None:
            return out, {}
        return out, {"attn/gate": info.mean(gate.float()).view(self.args.n_heads, -1).mean(dim=-1)}


class MoE(nn.Module):
    """Experts by softmax, and a shared one with a gate. (B, T, D) -> (B, T, D), {name: load, probabilities}."""

    expert_weights = ("gate_proj", "up_proj", "down_proj")
    scalar_params = ("router", "shared_gate")  # each row is a vector of its own, not a map of the stream

    def __init__(self, args):
        super().__init__()
        a = self.args = args
        self.router = nn.Parameter(torch.empty(a.n_routed_experts, a.dim))
        self.gate_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.moe_inter_dim, a.dim))  # (E, F, D)
        self.up_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.moe_inter_dim, a.dim))
        self.down_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.dim, a.moe_inter_dim))
        self.shared = SwiGLU(a.dim, a.shared_inter_dim)
        self.shared_gate = nn.Parameter(torch.empty(1, a.dim))

    def forward(self, x, info):
        a = self.args
        tokens = x.flatten(0, 1)  # (N, D)
        with torch.autocast(x.device.type, enabled=False):  # routing in fp32: a rounded tie is a different expert
            p = matmul(tokens.float(), self.router.float().T).softmax(dim=-1)  # (N, E)
            shared = matmul(x.float(), self.shared_gate.float().T).sigmoid()  # (B, T, 1)
        weight, chosen = p.topk(a.n_activated_experts, dim=-1, sorted=False)  # (N, A)
        weight = weight / weight.sum(dim=-1, keepdim=True)
        out = expert_swiglu(tokens, chosen, weight, self.gate_proj, self.up_proj, self.down_proj).view_as(x)
        out = out + shared.to(x.dtype) * self.shared(x)
        load = expert_load(chosen, a.n_routed_experts, info.token_mask).float()
        if info.state is not None:
            return out, {"load": load}
        p = p if info.token_mask is None else p * info.token_mask.flatten()[:, None]
        return out, {"load": load, "p": p.sum(dim=0), "moe/shared_gate": info.mean(shared)[0]}


class Block(nn.Module):
    """A mixer of tokens and a feed-forward, each on a normed copy of the stream. (B, T, D) -> same, {statistics}."""

    def __init__(self, args, layer, kind):
        super().__init__()
        self.attn_norm = ZeroCentredRMSNorm(args.dim, args.norm_eps)
        self.attn = (GatedDeltaNet if kind == LINEAR else GatedAttention)(args, layer)
        self.ffn_norm = ZeroCentredRMSNorm(args.dim, args.norm_eps)
        self.ffn = MoE(args) if args.n_routed_experts else SwiGLU(args.dim, args.inter_dim)

    def forward(self, x, info):
        out, stats = self.attn(self.attn_norm(x), info)
        x = x + out
        if not isinstance(self.ffn, MoE):
            return x + self.ffn(self.ffn_norm(x)), stats
        out, of_experts = self.ffn(self.ffn_norm(x), info)
        return x + out, stats | of_experts


class MTPModule(nn.Module):
    """Multi-token prediction (2412.19437, equations 21-23): from the model's output at position i and token i + 1."""

    def __init__(self, args):
        super().__init__()
        self.embed_norm = ZeroCentredRMSNorm(args.dim, args.norm_eps)
        self.hidden_norm = ZeroCentredRMSNorm(args.dim, args.norm_eps)
        self.proj = nn.Linear(2 * args.dim, args.dim, bias=False)  # M_1
        self.block = Block(args, layer=0, kind=FULL)  # layer 0 of a state of its own
        self.norm = ZeroCentredRMSNorm(args.dim, args.norm_eps)

    def forward(self, hidden, embedded, info):
        x = self.proj(torch.cat((self.embed_norm(embedded), self.hidden_norm(hidden)), dim=-1))
        x, stats = self.block(x, info)
        return self.norm(x), stats


class Qwen3_5Model(BaseModel):
    model_name = "mini_qwen3_5"
    hf_layout = layout(Qwen3_5ModelArgs)

    def __init__(self, args):
        super().__init__(args)
        self.tok_embed = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, i, kind) for i, kind in enumerate(args.mixers))
        self.norm = ZeroCentredRMSNorm(args.dim, args.norm_eps)
        self.lm_head = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.lm_head.weight = self.tok_embed.weight
        self.mtp = MTPModule(args) if args.n_mtp_layers else nn.Identity()
        self.rotary = Rotary(args.qk_rope_head_dim, args.max_seq_len, args.rope_theta, args)
        self.init_weights()
        if not args.n_mtp_layers:
            self.draft = None

    def token_info(self, input_ids, state=None, doc_ids=None):
        positions = token_positions(input_ids, state)
        token_mask = None if doc_ids is None else doc_ids >= 0
        return TokenInfo(self.rotary(positions), packed_mask(positions, state, doc_ids), doc_ids, token_mask, state)

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        self.check_length(input_ids)
        info = self.token_info(input_ids, state, doc_ids)
        embedded = x = self.tok_embed(input_ids)  # (B, T, D)
        stats = []
        for layer in self.layers:
            x, of_layer = layer(x, info)
            stats.append(of_layer)
        x = self.norm(x)
        other_vars = reported(stats)
        if targets is None:
            if state is not None:
                state.hidden = x
                x = x[:, -1:] if state.last_only else x
            return self.lm_head(x), None, other_vars
        squares = [] if self.z_loss else None
        other_vars["loss/ce"] = lm_loss(x, self.lm_head.weight, targets, squares=squares)
        balance = self._balance_loss(stats)
        if self.args.n_mtp_layers and input_ids.shape[1] > 1:
            further, of_module = self._predict_further(x, embedded, targets, doc_ids, squares)
            other_vars |= further
            balance += self._balance_loss(of_module)
        if balance:
            other_vars["loss/balance"] = sum(balance)
        if squares:
            other_vars["loss/z"] = self.z_loss * sum(squares)
        return None, sum(term for name, term in other_vars.items() if name.startswith("loss/")), other_vars

    def _balance_loss(self, stats):
        """alpha E sum_e f_e P_e (Fedus et al. 2021, "Switch Transformers", equations 4-6); [] without experts.

        f_e: the share of tokens that chose expert e; P_e: its mean probability, both over the tokens of all layers.
        """
        if "p" not in stats[0]:
            return []
        load, p = (torch.stack([each[name] for each in stats]).sum(dim=0) for name in ("load", "p"))  # (E,)
        n_tokens = load.sum().clamp(min=1) / self.args.n_activated_experts
        return [self.args.aux_loss_weight * len(p) * (load / n_tokens * (p / n_tokens)).sum()]

    def _predict_further(self, x, embedded, targets, doc_ids, squares):
        """Return the multi-token prediction loss (2412.19437, equations 24-25) in other_vars, and statistics.

        Position i knows tokens up to i + 1, and predicts token i + 2: `targets` moved by one. A pair whose two ends lie
        in different documents predicts nothing.
        """
        target, docs = targets[:, 1:], None
        if doc_ids is not None:
            docs = doc_ids[:, :-1]
            target = target.masked_fill(docs != doc_ids[:, 1:], -100)
        x, stats = self.mtp(x[:, :-1], embedded[:, 1:], self.token_info(target, doc_ids=docs))
        # Both equations divide by the T of the full sequence, so a depth is weighted by its remaining targets.
        share = (target != -100).sum() / (targets != -100).sum().clamp(min=1)
        loss = self.args.mtp_loss_weight * share * lm_loss(x, self.lm_head.weight, target, squares=squares)
        with torch.no_grad():  # accuracy at every 16th position, which avoids a second full pass of the output head
            sample = target[:, ::16]
            hits = (F.linear(x[:, ::16], self.lm_head.weight).argmax(dim=-1) == sample).sum()
        further = {"mtp/accuracy": hits / (sample != -100).sum().clamp(min=1), "loss/mtp": loss}
        if "load" in stats:
            further["moe/load_mtp"] = stats["load"][None].detach()
        return further, [stats]

    def draft(self, hidden, ids, state):
        """The module as a draft model, which goes on from the output of the final norm."""
        hidden, _ = self.mtp(hidden, self.tok_embed(ids), self.token_info(ids, state))
        return self.lm_head(hidden[:, -1:] if state.last_only else hidden), hidden

    def num_params(self):
        """As for every model; active: without the unchosen experts and the module that only training uses."""
        return super().num_params() | {"active": self._active(self) - self._active(self.mtp)}

    def _active(self, module):
        """Return how many parameters of `module` a token uses: not those of the experts that it does not choose."""
        a = self.args
        unchosen = (a.n_routed_experts - a.n_activated_experts) * 3 * a.dim * a.moe_inter_dim
        total = sum(p.numel() for p in module.parameters())
        return total - unchosen * sum(isinstance(m, MoE) for m in module.modules())

    def attention_flops_per_token(self, seq_len):
        """Return the forward FLOPs of scores and values of full layers, and of the recurrences of linear ones."""
        a, n_linear = self.args, self.args.mixers.count(LINEAR)
        heads = (a.linear_n_v_heads, a.linear_k_head_dim, a.linear_v_head_dim)
        full = 4 * seq_len * a.n_heads * a.head_dim * (a.n_layers - n_linear + a.n_mtp_layers)
        return full + n_linear * recurrence_flops(*heads, seq_len, a.chunk_size, n_k_heads=a.linear_n_k_heads)

    def flops_per_token(self, seq_len):
        """As for every model, plus in the MTP module its active weights and another use of the output head."""
        head = self.args.n_mtp_layers * self.args.vocab_size * self.args.dim
        return super().flops_per_token(seq_len) + 6 * (self._active(self.mtp) + head)


def reported(stats):
    """What training shows of the layers: {name: (layers, ...)}, of those layers that have it."""
    names = dict.fromkeys(name for of_layer in stats for name in of_layer if "/" in name)
    shown = {name: torch.stack([of_layer[name] for of_layer in stats if name in of_layer]) for name in names}
    if "load" in stats[0]:
        shown[MOE_LOAD] = torch.stack([of_layer["load"] for of_layer in stats]).detach()  # (L, E)
    return shown
