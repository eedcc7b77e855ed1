"""DeepSeek-V3 (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2), small.

Three ideas on top of a pre-norm decoder:
- multi-head latent attention (2.1.1): keys and values are up-projections of one low-rank latent, all that is cached;
- DeepSeekMoE without auxiliary loss (2.1.2): shared and routed experts, their load kept even by a bias on the choice;
- multi-token prediction (2.2): small sequential modules that predict one token further each, used in training only.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.basemodel import MOE_LOAD, BaseModel, BaseModelArgs, ModelError, State
from model.hf.deepseekv3 import layout
from model.layers import (
    Embedding,
    RMSNorm,
    RopeArgs,
    Rotary,
    SwiGLU,
    ZLoss,
    attention,
    cache_append,
    expert_load,
    expert_swiglu,
    lm_loss,
    matmul,
    packed_mask,
    rotate,
    sum_of_losses,
    token_positions,
    yarn_mscale,
)

MTP_ACCURACY_STRIDE = 16  # "mtp/accuracy" samples one position in so many
LATENT_NORM_EPS = 1e-6  # of the norms of the two latents; the published code has no setting for it


@dataclass
class DeepSeekV3ModelArgs(RopeArgs, BaseModelArgs):
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12
    n_dense_layers: int = 1  # the first layers have a dense feed-forward
    n_heads: int = 12  # H
    q_lora_rank: int = 384  # d_c', rank of the query latent; 0 = queries straight from the residual stream
    kv_lora_rank: int = 192  # d_c = R, rank of the latent that keys and values share
    qk_nope_head_dim: int = 64  # d_h, the part of a head without positions
    qk_rope_head_dim: int = 32  # d_h^R, the part with rotary positions; its key is shared by all heads
    v_head_dim: int = 64
    inter_dim: int = 2048  # F of the dense layers
    moe_inter_dim: int = 512  # F of one expert
    n_routed_experts: int = 8  # N_r = E
    n_shared_experts: int = 1  # N_s, always on
    n_activated_experts: int = 3  # K_r = A, routed experts per token
    n_expert_groups: int = 1  # experts are chosen from the best `n_limited_groups` of these groups
    n_limited_groups: int = 1
    norm_topk: bool = True  # the A weights of a token are divided by their sum
    route_scale: float = 1.0  # factor on the routed experts' weights
    bias_update_speed: float = 0.001  # gamma, step of the routing bias
    seq_aux_alpha: float = 0.0001  # alpha, weight of the sequence-wise balance loss
    n_mtp_layers: int = 1  # D of section 2.2, how many further tokens are predicted
    mtp_loss_weight: float = 0.3  # lambda
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_embeddings: bool = True

    def __post_init__(self):
        self.check_sizes("n_dense_layers", "q_lora_rank", "n_shared_experts", "n_mtp_layers")
        groups, experts = self.n_expert_groups, self.n_routed_experts
        if experts % groups:
            raise ModelError(f"n_routed_experts={experts} must be a multiple of n_expert_groups={groups}")
        usable = self.n_limited_groups * (experts // groups)
        if not 1 <= self.n_activated_experts <= usable:
            raise ModelError(
                f"n_activated_experts={self.n_activated_experts} must lie in 1..{usable}, the experts of the groups a "
                "token may use: change it or n_limited_groups"
            )
        if not 1 <= self.n_limited_groups <= groups:
            raise ModelError(f"n_limited_groups={self.n_limited_groups} must lie in 1..{groups}")
        if groups > 1 and experts // groups < 2:
            raise ModelError("a group is judged by its two best experts: use at least 2 experts per group")
        if self.qk_rope_head_dim % 2:
            raise ModelError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even, rotary positions turn pairs")
        self.check_rope()


class TokenInfo(NamedTuple):
    """What all blocks need to know of the tokens of a forward pass."""

    rope: tuple  # cos and sin
    mask: torch.Tensor | None = None  # which keys each query sees
    token_mask: torch.Tensor | None = None  # bool (B, T), False = padding; None: there is none
    state: State | None = None


# ------------------------------------------------------------------- 2.1.1 multi-head latent attention


class LatentAttention(nn.Module):
    """Multi-head latent attention (equations 1-11).

    The same scores are computed in two ways. Training and a first prompt expand the latent into keys and values of every
    head. Decoding keeps only the latent and the rotary key, R + d_h^R elements per token, and moves the up-projections to
    the other side of the products: q (W_UK c) = (q W_UK) c, and sum_s a_s (W_UV c_s) = W_UV (sum_s a_s c_s). That is
    attention with one shared key-value head of width R.
    """

    def __init__(self, args, layer):
        super().__init__()
        a = self.args = args
        self.layer = layer
        qk_head_dim = a.qk_nope_head_dim + a.qk_rope_head_dim
        self.scale = qk_head_dim**-0.5
        if a.rope_type == "yarn" and a.rope_mscale_all_dim:
            self.scale *= yarn_mscale(a.rope_factor, a.rope_mscale_all_dim) ** 2
        if a.q_lora_rank:
            self.q_a_proj = nn.Linear(a.dim, a.q_lora_rank, bias=False)  # W^DQ
            self.q_a_norm = RMSNorm(a.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(a.q_lora_rank, a.n_heads * qk_head_dim, bias=False)  # W^UQ, W^QR
        else:
            self.q_proj = nn.Linear(a.dim, a.n_heads * qk_head_dim, bias=False)
        self.kv_a_proj = nn.Linear(a.dim, a.kv_lora_rank + a.qk_rope_head_dim, bias=False)  # W^DKV, W^KR
        self.kv_a_norm = RMSNorm(a.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(a.kv_lora_rank, a.n_heads * (a.qk_nope_head_dim + a.v_head_dim), bias=False)
        self.o_proj = nn.Linear(a.n_heads * a.v_head_dim, a.dim, bias=False)

    def forward(self, x, info):
        a = self.args
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if a.q_lora_rank else self.q_proj(x)
        q = q.unflatten(-1, (a.n_heads, -1))  # (B, T, H, nope + rope)
        q_nope, q_rope = q.split((a.qk_nope_head_dim, a.qk_rope_head_dim), dim=-1)
        q_rope = rotate(q_rope, *info.rope)

        latent, k_rope = self.kv_a_proj(x).split((a.kv_lora_rank, a.qk_rope_head_dim), dim=-1)
        latent = self.kv_a_norm(latent)  # (B, T, R), c^KV
        k_rope = rotate(k_rope[:, :, None], *info.rope)[:, :, 0]  # (B, T, rope), one for all heads

        if info.state is not None:
            seen = cache_append(info.state, self.layer, "latent", torch.cat((latent, k_rope), dim=-1))
            if info.state.max_pos > 0:
                return self.o_proj(self._absorbed(q_nope, q_rope, seen, info.mask).flatten(-2))
        return self.o_proj(self._expanded(q_nope, q_rope, latent, k_rope, info.mask).flatten(-2))

    def _expanded(self, q_nope, q_rope, latent, k_rope, mask):
        a = self.args
        kv = self.kv_b_proj(latent).unflatten(-1, (a.n_heads, -1))  # (B, T, H, nope + v)
        k_nope, v = kv.split((a.qk_nope_head_dim, a.v_head_dim), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, a.n_heads, -1)), dim=-1)
        return attention(q, k, v, mask, self.scale)  # (B, T, H, v)

    def _absorbed(self, q_nope, q_rope, seen, mask):  # seen (B, S, R + rope)
        a = self.args
        up = self.kv_b_proj.weight.unflatten(0, (a.n_heads, -1))  # (H, nope + v, R)
        up_k, up_v = up.split((a.qk_nope_head_dim, a.v_head_dim), dim=1)
        q_latent = matmul(q_nope.transpose(1, 2), up_k).transpose(1, 2)  # (B, T, H, R)
        q = torch.cat((q_latent, q_rope), dim=-1)
        k = seen[:, :, None]  # (B, S, 1, R + rope)
        mixed = attention(q, k, k[..., : a.kv_lora_rank], mask, self.scale)  # (B, T, H, R)
        return matmul(mixed.transpose(1, 2), up_v.mT).transpose(1, 2)  # (B, T, H, v)


# ------------------------------------------------------------------- 2.1.2 DeepSeekMoE


class MoEStats(NamedTuple):
    """What a MoE layer reports: the load (E,) of its experts, and its balance loss (None while decoding)."""

    load: torch.Tensor
    balance: torch.Tensor | None


class MoE(nn.Module):
    """DeepSeekMoE with auxiliary-loss-free balancing (equations 12-20). (B, T, D) -> (B, T, D), MoEStats."""

    expert_weights = ("gate_proj", "up_proj", "down_proj")  # the stacks of experts

    def __init__(self, args):
        super().__init__()
        a = self.args = args
        self.router = nn.Parameter(torch.empty(a.n_routed_experts, a.dim))  # the centroids e_i
        # Added to the affinities for the choice only, moved by `after_step`: no gradient, fp32, saved with the weights.
        self.register_buffer("routing_bias", torch.zeros(a.n_routed_experts))
        self.gate_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.moe_inter_dim, a.dim))  # (E, F, D)
        self.up_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.moe_inter_dim, a.dim))
        self.down_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.dim, a.moe_inter_dim))
        self.shared = SwiGLU(a.dim, a.n_shared_experts * a.moe_inter_dim) if a.n_shared_experts else None

    def forward(self, x, info):
        a = self.args
        tokens = x.flatten(0, 1)  # (N, D)
        with torch.autocast(x.device.type, enabled=False):  # routing in fp32: a rounded tie is a different expert
            affinity = matmul(tokens.float(), self.router.float().T).sigmoid()  # (N, E), s_{i,t}
        chosen = self._choose(affinity.detach())  # (N, A)
        weight = affinity.gather(1, chosen)
        if a.norm_topk:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        weight = weight * a.route_scale

        load = expert_load(chosen, a.n_routed_experts, info.token_mask)
        out = expert_swiglu(tokens, chosen, weight, self.gate_proj, self.up_proj, self.down_proj)
        out = out.view_as(x)  # (B, T, D)
        if self.shared is not None:
            out = out + self.shared(x)
        decoding = info.state is not None
        balance = None if decoding else self._balance_loss(affinity.view(*x.shape[:2], -1), info.token_mask)
        return out, MoEStats(load.float(), balance)

    def _choose(self, affinity):
        """Return the chosen experts (N, A): the best by affinity + bias, from the best groups (equation 16, 2.1.2).

        A group is as good as its two best experts together: so does the code released with the weights.
        """
        a = self.args
        score = affinity + self.routing_bias
        if a.n_limited_groups < a.n_expert_groups:
            groups = score.unflatten(-1, (a.n_expert_groups, -1))  # (N, groups, E / groups)
            best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(a.n_limited_groups, dim=-1).indices
            allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
            score = groups.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
        return score.topk(a.n_activated_experts, dim=-1, sorted=False).indices

    def _balance_loss(self, affinity, token_mask):
        """Complementary sequence-wise balance loss (equations 17-20), mean over the sequences. affinity (B, T, E)."""
        a = self.args
        top = affinity.detach().topk(a.n_activated_experts, dim=-1, sorted=False).indices  # without the bias
        hits = torch.zeros_like(affinity).scatter_(-1, top, 1.0)
        is_token = affinity.new_ones(affinity.shape[:2]) if token_mask is None else token_mask.to(affinity.dtype)
        share = (is_token / is_token.sum(dim=1, keepdim=True).clamp(min=1))[..., None]  # (B, T, 1), the 1 / T
        f = (hits * share).sum(dim=1) * (a.n_routed_experts / a.n_activated_experts)  # (B, E)
        p = (affinity / affinity.sum(dim=-1, keepdim=True) * share).sum(dim=1)
        return a.seq_aux_alpha * (f * p).sum(dim=-1).mean()

    @torch.no_grad()
    def update_bias(self, load):
        """Move the bias of each expert by gamma: up when it carried less than the mean load (E,), down when more."""
        self.routing_bias += self.args.bias_update_speed * (load.mean() - load).sign()


class Block(nn.Module):
    """Attention and feed-forward, each on a normed copy of the stream. (B, T, D) -> (B, T, D), MoEStats or None."""

    def __init__(self, args, layer, moe):
        super().__init__()
        self.attn_norm = RMSNorm(args.dim, args.norm_eps)
        self.attn = LatentAttention(args, layer)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn = MoE(args) if moe else SwiGLU(args.dim, args.inter_dim)

    def forward(self, x, info):
        x = x + self.attn(self.attn_norm(x), info)
        if not isinstance(self.ffn, MoE):
            return x + self.ffn(self.ffn_norm(x)), None
        out, stats = self.ffn(self.ffn_norm(x), info)
        return x + out, stats


# ------------------------------------------------------------------- 2.2 multi-token prediction


class MTPModule(nn.Module):
    """Depth k of multi-token prediction (equations 21-23): from position i's output of depth k - 1 and token i + k."""

    def __init__(self, args, depth):
        super().__init__()
        self.embed_norm = RMSNorm(args.dim, args.norm_eps)
        self.hidden_norm = RMSNorm(args.dim, args.norm_eps)
        self.proj = nn.Linear(2 * args.dim, args.dim, bias=False)  # M_k
        self.block = Block(args, layer=depth, moe=args.n_dense_layers < args.n_layers)
        self.norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, hidden, embedded, info):
        x = self.proj(torch.cat((self.embed_norm(embedded), self.hidden_norm(hidden)), dim=-1))
        x, stats = self.block(x, info)
        return self.norm(x), stats


class DeepSeekV3Model(BaseModel):
    model_name = "mini_deepseekv3"
    hf_layout = layout(DeepSeekV3ModelArgs)

    def __init__(self, args):
        super().__init__(args)
        self.tok_embed = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, i, moe=i >= args.n_dense_layers) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.lm_head = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.lm_head.weight = self.tok_embed.weight
        self.mtp = nn.ModuleList(MTPModule(args, depth) for depth in range(args.n_mtp_layers))
        self.rotary = Rotary(args.qk_rope_head_dim, args.max_seq_len, args.rope_theta, args)
        self.init_weights()
        if not args.n_mtp_layers:
            self.draft = None

    def token_info(self, input_ids, state=None, doc_ids=None):
        positions = token_positions(input_ids, state)
        token_mask = None if doc_ids is None else doc_ids >= 0
        return TokenInfo(self.rotary(positions), packed_mask(positions, state, doc_ids), token_mask, state)

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        self.check_length(input_ids)
        info = self.token_info(input_ids, state, doc_ids)
        embedded = x = self.tok_embed(input_ids)  # (B, T, D)
        stats = []
        for layer in self.layers:
            x, of_layer = layer(x, info)
            stats.append(of_layer)
        x = self.norm(x)
        stats = [of_layer for of_layer in stats if of_layer is not None]
        other_vars = {MOE_LOAD: loads(stats)} if stats else {}

        if targets is None:
            if state is not None:
                state.hidden = x
                x = x[:, -1:] if state.last_only else x
            return self.lm_head(x), None, other_vars

        z = ZLoss(self.z_loss)
        other_vars["loss/ce"] = lm_loss(x, self.lm_head.weight, targets, z_loss=z)
        if self.mtp:
            mtp_vars, mtp_stats = self._predict_further(x, embedded, targets, doc_ids, z)
            other_vars |= mtp_vars
            stats += mtp_stats
        if stats:
            other_vars["loss/balance"] = torch.stack([of_layer.balance for of_layer in stats]).sum()
        other_vars |= z.terms()
        return None, sum_of_losses(other_vars), other_vars

    def _predict_further(self, x, embedded, targets, doc_ids, z):
        """Return the multi-token prediction loss (equations 24-25) in other_vars, and the MoEStats of the modules.

        At depth k position i stands for token i and knows tokens up to i + k; it predicts token i + k + 1, which is
        `targets` moved by k. A pair whose two ends lie in different documents predicts nothing.
        """
        losses, stats = [], []
        hits, seen = 0, 0
        n_targets = (targets != -100).sum().clamp(min=1)
        for k, module in enumerate(self.mtp, start=1):
            n = targets.shape[1] - k  # positions that still have a token i + k
            if n < 1:
                break
            target = targets[:, k:]
            docs = None
            if doc_ids is not None:
                docs = doc_ids[:, :n]
                target = target.masked_fill(docs != doc_ids[:, k:], -100)
            x, of_module = module(x[:, :n], embedded[:, k:], self.token_info(target, doc_ids=docs))
            stats.append(of_module)
            # Both equations divide by the T of the whole sequence, so a depth weighs by the targets that it has left.
            share = (target != -100).sum() / n_targets
            losses.append(lm_loss(x, self.lm_head.weight, target, z_loss=z) * share)
            with torch.no_grad():  # how often it is right, from a sample of the positions: no second output head
                sample = target[:, ::MTP_ACCURACY_STRIDE]
                hits += (F.linear(x[:, ::MTP_ACCURACY_STRIDE], self.lm_head.weight).argmax(dim=-1) == sample).sum()
                seen += (sample != -100).sum()
        stats = [of_module for of_module in stats if of_module is not None]
        other_vars = {}
        if losses:
            other_vars["mtp/accuracy"] = hits / seen.clamp(min=1)
            other_vars["loss/mtp"] = self.args.mtp_loss_weight * torch.stack(losses).sum() / len(self.mtp)
        if stats:
            other_vars["moe/load_mtp"] = loads(stats)
        return other_vars, stats

    def draft(self, hidden, ids, state):
        """The first module as a draft model (section 2.2.3), by the contract's `draft`."""
        hidden, _ = self.mtp[0](hidden, self.tok_embed(ids), self.token_info(ids, state))
        return self.lm_head(hidden[:, -1:] if state.last_only else hidden), hidden

    def after_step(self, other_vars):
        """Move every routing bias by the load of the step (2.1.2, auxiliary-loss-free load balancing)."""
        for key, blocks in ((MOE_LOAD, self.layers), ("moe/load_mtp", [module.block for module in self.mtp])):
            if key in other_vars:
                moes = [block.ffn for block in blocks if isinstance(block.ffn, MoE)]
                for moe, load in zip(moes, other_vars[key], strict=True):
                    moe.update_bias(load)

    # ---------------------------------------------------------------- what it counts

    def param_groups(self):
        """As every model, but the routers count as scalars: each row is a vector of its own, not a map of the stream."""
        groups = super().param_groups()
        routers = {id(m.router) for m in self.modules() if isinstance(m, MoE)}
        groups["scalar"] += [p for p in groups["matrix"] if id(p) in routers]
        groups["matrix"] = [p for p in groups["matrix"] if id(p) not in routers]
        return groups

    def num_params(self):
        """As every model; active: without the unchosen experts and the MTP modules, which only training uses."""
        counts = super().num_params()
        counts["active"] -= count(self.mtp) + sum(self._unchosen(block) for block in self.layers)
        return counts

    def _unchosen(self, block):
        a = self.args
        return (a.n_routed_experts - a.n_activated_experts) * 3 * a.dim * a.moe_inter_dim * isinstance(block.ffn, MoE)

    def attention_flops_per_token(self, seq_len):
        """Return the forward FLOPs of scores and values of all layers, expanded form, MTP modules included."""
        a = self.args
        width = a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)
        return 2 * seq_len * (a.n_layers + a.n_mtp_layers) * width

    def flops_per_token(self, seq_len):
        """As every model, plus in each MTP module its active weights and another use of the output head."""
        head = self.args.vocab_size * self.args.dim
        mtp = sum(count(module) - self._unchosen(module.block) + head for module in self.mtp)
        return super().flops_per_token(seq_len) + 6 * mtp


def loads(stats):
    return torch.stack([of_layer.load for of_layer in stats]).detach()  # (L, E)


def count(module):
    return sum(p.numel() for p in module.parameters())
