"""Nemotron-H (NVIDIA 2025, "Nemotron-H: A Family of Accurate and Efficient Hybrid Mamba-Transformer Models"), small.

2504.03624: a block is one mixer with a norm before it. Most are Mamba-2 (Dao & Gu 2024, "Transformers are SSMs",
2405.21060) or a feed-forward with squared ReLU, few are attention, and nothing has positions. Nemotron 3 (2512.20848)
has experts for feed-forwards, in its larger models in a latent (Elango et al. 2026, "LatentMoE", 2601.18089).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.basemodel import MOE_LOAD, BaseModel, BaseModelArgs, State, require
from model.hf.nemotron_h import layout
from model.layers.attention import attention, cache_append, matmul, packed_mask
from model.layers.conv import CausalConv
from model.layers.embedding import Embedding
from model.layers.experts import expert_linear, experts
from model.layers.loss import lm_loss
from model.layers.moe import expert_load
from model.layers.norm import RMSNorm
from model.layers.recurrence import delta_rule, recurrence_flops
from model.layers.rotary import token_positions
from model.layers.routing import balance_loss, choose_experts

KINDS = ("linear_attention", "full_attention", "moe", "mlp")
MAMBA, ATTENTION, MOE, MLP = KINDS  # M, *, E and - in the published patterns


@dataclass
class NemotronHModelArgs(BaseModelArgs):
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 24  # blocks of one mixer each
    layer_types: tuple[str, ...] = ()  # linear_attention, full_attention, moe or mlp; empty: see `usual_kinds`
    mamba_n_heads: int = 24  # H of Mamba-2
    mamba_head_dim: int = 64  # P
    mamba_state_dim: int = 64  # N
    mamba_n_groups: int = 2  # G, groups of heads that share B and C
    conv_size: int = 4  # tokens that the convolution of Mamba-2 sees
    chunk_size: int = 64  # Q, tokens that the recurrence takes at once: speed alone
    time_step_min: float = 0.0  # least step of Mamba-2; above 0 in transformers alone
    n_heads: int = 12  # H of attention
    n_kv_heads: int = 2  # G; each serves H / G query heads
    head_dim: int = 64  # K
    inter_dim: int = 3072  # F of a feed-forward without experts
    n_routed_experts: int = 8  # E; 0: feed-forwards without experts
    n_activated_experts: int = 2  # A, routed experts per token
    moe_inter_dim: int = 768  # F of one expert
    moe_latent_dim: int = 0  # width of the latent that experts read and write; 0: that of the stream
    shared_inter_dim: int = 768  # F of the expert that every token uses
    n_expert_groups: int = 1  # experts are chosen from the best `n_limited_groups` of these groups
    n_limited_groups: int = 1
    norm_topk: bool = True  # the A weights of a token are divided by their sum
    route_scale: float = 2.5  # factor on the routed experts' weights
    bias_update_speed: float = 0.001  # step of the routing bias
    seq_aux_alpha: float = 0.0001  # weight of the sequence-wise balance loss
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self):
        self.check_sizes("n_routed_experts")
        heads, groups = self.n_heads, self.n_kv_heads
        require(heads % groups == 0, f"n_heads={heads} must be a multiple of n_kv_heads={groups}: change one")
        heads, groups = self.mamba_n_heads, self.mamba_n_groups
        require(heads % groups == 0, f"mamba_n_heads={heads} must be a multiple of mamba_n_groups={groups}: change one")
        types = tuple(self.layer_types)
        require(len(types) in (0, self.n_layers), f"layer_types has {len(types)} entries, n_layers={self.n_layers}")
        require({*types} <= {*KINDS}, f"layer_types={','.join(types)}: choose from {', '.join(KINDS)}")
        self.layer_types = () if types == self.usual_kinds() else types
        n_experts, groups, limited = self.n_routed_experts, self.n_expert_groups, self.n_limited_groups
        require(n_experts or MOE not in types, "layer_types has moe, and n_routed_experts=0: give it experts")
        if n_experts:
            require(
                n_experts % groups == 0, f"n_routed_experts={n_experts} must be a multiple of n_expert_groups={groups}"
            )
            require(limited <= groups, f"n_limited_groups={limited} must lie in 1..{groups}")
            require(n_experts > groups, "a group is scored by its two best experts: use at least 2 each")
            active, usable = self.n_activated_experts, limited * (n_experts // groups)
            require(
                active <= usable,
                f"n_activated_experts={active} must lie in 1..{usable}, the experts of {limited} groups",
            )

    @property
    def kinds(self):
        """The kind of each block."""
        return self.layer_types or self.usual_kinds()

    def usual_kinds(self):
        """Mixers of tokens and feed-forwards in turn; of four mixers, the third is attention, the others Mamba-2."""
        ffn = MOE if self.n_routed_experts else MLP
        return tuple(ffn if i % 2 else ATTENTION if i % 8 == 4 else MAMBA for i in range(self.n_layers))

    @classmethod
    def tiny(cls):
        """Every kind of block, chunks of 8 tokens, heads that share B and C, experts in groups and in a latent."""
        mamba = {"mamba_n_heads": 4, "mamba_head_dim": 6, "mamba_state_dim": 8, "mamba_n_groups": 2, "conv_size": 3}
        attention = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
        routing = {"n_routed_experts": 6, "n_activated_experts": 2, "n_expert_groups": 3, "n_limited_groups": 2}
        widths = {"inter_dim": 48, "moe_inter_dim": 20, "moe_latent_dim": 12, "shared_inter_dim": 14}
        sizes = {"vocab_size": 97, "max_seq_len": 24, "dim": 32, "n_layers": 6, "chunk_size": 8}
        types = (MAMBA, MOE, MAMBA, MLP, ATTENTION, MOE)
        # a large epsilon: where a memory returns little, the norm enlarges its rounding
        return cls(**sizes, **mamba, **attention, **routing, **widths, layer_types=types, norm_eps=0.01)


class TokenInfo(NamedTuple):
    """Inputs of every block: visible keys, documents (B, T), token mask (B, T; False = padding), state."""

    mask: torch.Tensor | None = None
    doc_ids: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None
    state: State | None = None


class GatedRMSNorm(nn.Module):
    """RMSNorm of x * silu(z) within each of several groups of channels: the gate comes first. x, z (..., D) -> same."""

    def __init__(self, dim, n_groups, eps):
        super().__init__()
        self.n_groups = n_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x, z):
        groups = (x * F.silu(z)).unflatten(-1, (self.n_groups, -1))
        return F.rms_norm(groups, groups.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class Mamba2(nn.Module):
    """Mamba-2 (2405.21060, section 7). (B, T, D) -> (B, T, D), {name: statistics (H,)}.

    Each head has a state h (N, P), which decays at a rate A by the length of a step Delta, and takes in the token:

        h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t^T,  y_t = h_t^T C_t + D x_t
    """

    not_quantized = ("dt_proj",)  # a rounded decay is taken to the power of the distance

    def __init__(self, args, layer):
        super().__init__()
        a = self.args = args
        self.layer = layer
        x_dim, b_dim = a.mamba_n_heads * a.mamba_head_dim, a.mamba_n_groups * a.mamba_state_dim
        self.sizes = (x_dim, b_dim, b_dim)
        self.z_proj = nn.Linear(a.dim, x_dim, bias=False)  # the output gate
        self.xbc_proj = nn.Linear(a.dim, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(a.dim, a.mamba_n_heads, bias=False)  # Delta
        self.conv = CausalConv(sum(self.sizes), a.conv_size, bias=True)
        self.A_log = nn.Parameter(torch.empty(a.mamba_n_heads))
        self.D = nn.Parameter(torch.ones(a.mamba_n_heads))
        self.dt_bias = nn.Parameter(torch.empty(a.mamba_n_heads))
        self.norm = GatedRMSNorm(x_dim, a.mamba_n_groups, a.norm_eps)
        self.o_proj = nn.Linear(x_dim, a.dim, bias=False)

    def init_weights(self):
        """-A uniform in 1..16, Delta log-uniform in 0.001..0.1: a head remembers from one to a thousand tokens."""
        nn.init.uniform_(self.A_log, 1, 16).data.log_()
        step = nn.init.uniform_(self.dt_bias, math.log(0.001), math.log(0.1)).data.exp_()
        step.add_(torch.log(-torch.expm1(-step)))  # now softplus(dt_bias) is the step

    def forward(self, x, info):
        a, state = self.args, info.state
        xbc = F.silu(self.conv(self.xbc_proj(x), state, self.layer, doc_ids=info.doc_ids))
        h, b, c = xbc.split(self.sizes, dim=-1)
        h = h.unflatten(-1, (a.mamba_n_heads, -1)).float()  # (B, T, H, P), the x of the equations
        b, c = (part.unflatten(-1, (a.mamba_n_groups, -1)) for part in (b, c))  # (B, T, G, N)
        step = F.softplus(self.dt_proj(x).float() + self.dt_bias.float()).clamp(min=a.time_step_min)  # (B, T, H)
        log_decay = -self.A_log.float().exp() * step
        memory = None if state is None else state.layers[self.layer].get("memory")
        y, memory = delta_rule(c, b, step[..., None] * h, log_decay, None, memory, info.doc_ids, a.chunk_size)
        if state is not None:
            state.layers[self.layer]["memory"] = memory  # (B, H, N, P)
        y = (y + self.D.float()[:, None] * h).flatten(-2)
        out = self.o_proj(self.norm(y, self.z_proj(x)).to(x.dtype))
        if state is not None:
            return out, {}
        mean = {"mamba/step": step, "mamba/decay": log_decay.exp()}
        return out, {name: value.detach().mean(dim=(0, 1)) for name, value in mean.items()}


class Attention(nn.Module):
    """Grouped-query attention without positions: Mamba-2 before it knows the order. (B, T, D) -> same, {}."""

    def __init__(self, args, layer):
        super().__init__()
        self.layer = layer
        self.head_dim = args.head_dim
        self.q_proj = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.k_proj = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.v_proj = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.o_proj = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x, info):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if info.state is not None:
            k = cache_append(info.state, self.layer, "k", k)  # (B, S, G, K)
            v = cache_append(info.state, self.layer, "v", v)
        return self.o_proj(attention(q, k, v, info.mask).flatten(-2)), {}


class FeedForward(nn.Module):
    """down(relu(up(x))^2) (So et al. 2021, "Primer"). (B, T, D) -> same, {the share of units that are not 0}."""

    def __init__(self, dim, inter_dim):
        super().__init__()
        self.up_proj = nn.Linear(dim, inter_dim, bias=False)
        self.down_proj = nn.Linear(inter_dim, dim, bias=False)

    def forward(self, x, info):
        h = F.relu(self.up_proj(x))
        out = self.down_proj(h.square())
        return out, {} if info.state is not None else {"ffn/active": (h.detach()[:, ::16] > 0).float().mean()}


class MoE(nn.Module):
    """Experts of the same form in a latent (2601.18089), chosen as in DeepSeek-V3 (2412.19437, section 2.1.2).

    (B, T, D) -> (B, T, D), {name: load, balance loss}.
    """

    expert_weights = ("up_proj", "down_proj")
    scalar_params = ("router",)  # each row is a vector of its own, not a map of the stream

    def __init__(self, args):
        super().__init__()
        a = self.args = args
        width = a.moe_latent_dim or a.dim
        self.router = nn.Parameter(torch.empty(a.n_routed_experts, a.dim))
        # Added to the affinities for the choice only, moved by `after_step`: no gradient, fp32, saved with the weights.
        self.register_buffer("routing_bias", torch.zeros(a.n_routed_experts))
        self.latent_in = nn.Linear(a.dim, width, bias=False) if a.moe_latent_dim else nn.Identity()
        self.up_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.moe_inter_dim, width))  # (E, F, D or latent)
        self.down_proj = nn.Parameter(torch.empty(a.n_routed_experts, width, a.moe_inter_dim))
        self.latent_out = nn.Linear(width, a.dim, bias=False) if a.moe_latent_dim else nn.Identity()
        self.shared = FeedForward(a.dim, a.shared_inter_dim)

    def forward(self, x, info):
        a = self.args
        tokens = x.flatten(0, 1)  # (N, D)
        with torch.autocast(x.device.type, enabled=False):  # routing in fp32: a rounded tie is a different expert
            affinity = matmul(tokens.float(), self.router.float().T).sigmoid()  # (N, E)
        score = affinity.detach() + self.routing_bias
        chosen = choose_experts(score, a.n_activated_experts, a.n_expert_groups, a.n_limited_groups)  # (N, A)
        weight = affinity.gather(1, chosen)
        if a.norm_topk:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        routed = experts(self.latent_in(tokens), chosen, weight * a.route_scale, self._expert, a.n_routed_experts)
        shared, stats = self.shared(x, info)
        out = self.latent_out(routed).view_as(x) + shared
        stats = stats | {MOE_LOAD: expert_load(chosen, a.n_routed_experts, info.token_mask).float()}
        if info.state is not None:
            return out, stats
        affinity = affinity.view(*x.shape[:2], -1)
        return out, stats | {"balance": balance_loss(affinity, a.n_activated_experts, info.token_mask)}

    def _expert(self, x, e):
        return expert_linear(F.relu(expert_linear(x, self.up_proj, e)).square(), self.down_proj, e)


class Block(nn.Module):
    """x + mixer(norm(x)), with one mixer of any kind. (B, T, D) -> (B, T, D), {statistics}."""

    def __init__(self, args, layer, kind):
        super().__init__()
        self.norm = RMSNorm(args.dim, args.norm_eps)
        if kind == MAMBA:
            self.mixer = Mamba2(args, layer)
        elif kind == ATTENTION:
            self.mixer = Attention(args, layer)
        else:
            self.mixer = MoE(args) if kind == MOE else FeedForward(args.dim, args.inter_dim)

    def forward(self, x, info):
        out, stats = self.mixer(self.norm(x), info)
        return x + out, stats


class NemotronHModel(BaseModel):
    model_name = "mini_nemotron_h"
    hf_layout = layout(NemotronHModelArgs)

    def __init__(self, args):
        super().__init__(args)
        self.tok_embed = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, layer, kind) for layer, kind in enumerate(args.kinds))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.lm_head = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.lm_head.weight = self.tok_embed.weight
        self.init_weights()

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        self.check_length(input_ids)
        mask = packed_mask(token_positions(input_ids, state), state, doc_ids)
        info = TokenInfo(mask, doc_ids, None if doc_ids is None else doc_ids >= 0, state)
        x = self.tok_embed(input_ids)  # (B, T, D)
        stats = []
        for layer in self.layers:
            x, of_layer = layer(x, info)
            stats.append(of_layer)
        x = self.norm(x)
        names = dict.fromkeys(name for of_layer in stats for name in of_layer)
        stats = {name: torch.stack([of_layer[name] for of_layer in stats if name in of_layer]) for name in names}
        balance = stats.pop("balance", None)
        other_vars = {name: value.detach() for name, value in stats.items()}  # (layers that have it, ...)
        if targets is None:
            if state is not None and state.last_only:
                x = x[:, -1:]
            return self.lm_head(x), None, other_vars
        squares = [] if self.z_loss else None
        losses = {"loss/ce": lm_loss(x, self.lm_head.weight, targets, squares=squares)}
        if balance is not None:
            losses["loss/balance"] = self.args.seq_aux_alpha * balance.sum()
        if squares:
            losses["loss/z"] = self.z_loss * sum(squares)
        return None, sum(losses.values()), losses | other_vars

    def after_step(self, other_vars):
        """Move every routing bias: up for an expert below the mean load of the step, down for one above it."""
        moes = [module for module in self.modules() if isinstance(module, MoE)]
        for moe, load in zip(moes, other_vars.get(MOE_LOAD, ())):
            moe.routing_bias += self.args.bias_update_speed * (load.mean() - load).sign()

    def num_params(self):
        """As for every model; active: without the experts that a token does not choose."""
        a, counts = self.args, super().num_params()
        unchosen = (a.n_routed_experts - a.n_activated_experts) * 2 * (a.moe_latent_dim or a.dim) * a.moe_inter_dim
        return counts | {"active": counts["total"] - unchosen * a.kinds.count(MOE)}

    def attention_flops_per_token(self, seq_len):
        """Return the forward FLOPs of scores and values of attention, and of the recurrences of Mamba-2."""
        a = self.args
        heads = (a.mamba_n_heads, a.mamba_state_dim, a.mamba_head_dim)
        mamba = recurrence_flops(*heads, seq_len, a.chunk_size, erase=False, n_k_heads=a.mamba_n_groups)
        return a.kinds.count(MAMBA) * mamba + a.kinds.count(ATTENTION) * 4 * seq_len * a.n_heads * a.head_dim
