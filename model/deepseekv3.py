"""DeepSeek-V3 (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2), small.

Three ideas on top of a pre-norm decoder:
- multi-head latent attention (2.1.1): keys and values are up-projections of one low-rank latent, all that is cached;
- DeepSeekMoE without auxiliary loss (2.1.2): shared and routed experts, their load kept even by a bias on the choice;
- multi-token prediction (2.2): small sequential modules that predict one token further each, used in training only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model.basemodel import BaseModel, BaseModelArgs, ModelError
from model.hf.layout import Layout, interleaved_rows
from model.layers import (
    Embedding,
    RMSNorm,
    RopeArgs,
    Rotary,
    SwiGLU,
    attention,
    attention_mask,
    cache_append,
    expert_load,
    expert_swiglu,
    lm_loss,
    matmul,
    packed_mask,
    rotate,
    token_positions,
    yarn_mscale,
)

MTP_ACCURACY_STRIDE = 16  # every so many positions are looked at for "mtp/accuracy"
LATENT_NORM_EPS = 1e-6  # of the norms of the two latents; in the published code it is no setting


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
    n_activated_experts: int = 3  # K_r = A, routed experts a token uses
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
        a = self
        a.check_sizes("n_dense_layers", "q_lora_rank", "n_shared_experts", "n_mtp_layers")
        if a.n_routed_experts % a.n_expert_groups:
            raise ModelError(
                f"n_routed_experts={a.n_routed_experts} must be a multiple of n_expert_groups={a.n_expert_groups}"
            )
        per_group = a.n_routed_experts // a.n_expert_groups
        if not 1 <= a.n_activated_experts <= a.n_limited_groups * per_group:
            raise ModelError(
                f"n_activated_experts={a.n_activated_experts} must lie in "
                f"1..{a.n_limited_groups * per_group}, the experts of the groups a token may "
                "use: change it or n_limited_groups"
            )
        if not 1 <= a.n_limited_groups <= a.n_expert_groups:
            raise ModelError(f"n_limited_groups={a.n_limited_groups} must lie in 1..{a.n_expert_groups}")
        if a.n_expert_groups > 1 and per_group < 2:
            raise ModelError("a group is judged by its two best experts: use at least 2 experts a group")
        if a.qk_rope_head_dim % 2:
            raise ModelError(f"qk_rope_head_dim={a.qk_rope_head_dim} must be even, rotary positions turn pairs")
        a.check_rope()


class LatentAttention(nn.Module):
    """Multi-head latent attention (equations 1-11).

    The same scores are computed in two ways. Training and a first prompt expand the latent into keys and values of
    every head. Decoding keeps only the latent and the rotary key, R + d_h^R numbers a token, and moves the
    up-projections to the other side of the products: q (W_UK c) = (q W_UK) c, and sum_s a_s (W_UV c_s) =
    W_UV (sum_s a_s c_s). That is attention with one shared key-value head of width R.
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

    def forward(self, x, rope, mask, state=None):
        a = self.args
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if a.q_lora_rank else self.q_proj(x)
        q = q.unflatten(-1, (a.n_heads, -1))  # (B, T, H, nope + rope)
        q_nope, q_rope = q.split((a.qk_nope_head_dim, a.qk_rope_head_dim), dim=-1)
        q_rope = rotate(q_rope, *rope)

        latent, k_rope = self.kv_a_proj(x).split((a.kv_lora_rank, a.qk_rope_head_dim), dim=-1)
        latent = self.kv_a_norm(latent)  # (B, T, R), c^KV
        k_rope = rotate(k_rope[:, :, None], *rope)[:, :, 0]  # (B, T, rope), one for all heads

        if state is not None:
            seen = cache_append(state, self.layer, "latent", torch.cat((latent, k_rope), dim=-1))  # (B, S, R + rope)
            if state.max_pos > 0:
                return self.o_proj(self._absorbed(q_nope, q_rope, seen, mask).flatten(-2))
        return self.o_proj(self._expanded(q_nope, q_rope, latent, k_rope, mask).flatten(-2))

    def _expanded(self, q_nope, q_rope, latent, k_rope, mask):
        a = self.args
        kv = self.kv_b_proj(latent).unflatten(-1, (a.n_heads, -1))  # (B, T, H, nope + v)
        k_nope, v = kv.split((a.qk_nope_head_dim, a.v_head_dim), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, a.n_heads, -1)), dim=-1)
        return attention(q, k, v, mask, self.scale)  # (B, T, H, v)

    def _absorbed(self, q_nope, q_rope, seen, mask):
        a = self.args
        up = self.kv_b_proj.weight.unflatten(0, (a.n_heads, -1))  # (H, nope + v, R)
        up_k, up_v = up.split((a.qk_nope_head_dim, a.v_head_dim), dim=1)
        q_latent = matmul(q_nope.transpose(1, 2), up_k).transpose(1, 2)  # (B, T, H, R)
        mixed = attention(
            torch.cat((q_latent, q_rope), dim=-1),
            seen[:, :, None],
            seen[:, :, None, : a.kv_lora_rank],
            mask,
            self.scale,
        )  # (B, T, H, R)
        return matmul(mixed.transpose(1, 2), up_v.mT).transpose(1, 2)  # (B, T, H, v)


class MoE(nn.Module):
    """DeepSeekMoE with auxiliary-loss-free balancing (equations 12-20). (B, T, D) -> (B, T, D), load (E,), balance loss
    (None while decoding, where nobody wants it). Both are of the tokens that are `real` (B, T), all by default."""

    expert_weights = ("gate_proj", "up_proj", "down_proj")  # the stacks that may be held at 8 bits

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

    def forward(self, x, decoding=False, real=None):
        a = self.args
        tokens = x.flatten(0, 1)  # (N, D)
        with torch.autocast(x.device.type, enabled=False):  # routing in fp32: a rounded tie is a different expert
            affinity = matmul(tokens.float(), self.router.float().T).sigmoid()  # (N, E), s_{i,t}
        chosen = self._choose(affinity.detach())  # (N, A)
        weight = affinity.gather(1, chosen)
        if a.norm_topk:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        weight = weight * a.route_scale

        load = expert_load(chosen, a.n_routed_experts, None if real is None else real.flatten())
        out = expert_swiglu(tokens, chosen, weight, self.gate_proj, self.up_proj, self.down_proj)
        out = out.view_as(x)  # (B, T, D)

        if self.shared is not None:
            out = out + self.shared(x)
        return out, load.float(), None if decoding else self._balance_loss(affinity.view(*x.shape[:2], -1), real)

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

    def _balance_loss(self, affinity, real=None):
        """Complementary sequence-wise balance loss (equations 17-20), the mean over the rows. affinity (B, T, E)."""
        a = self.args
        top = affinity.detach().topk(a.n_activated_experts, dim=-1, sorted=False).indices  # without the bias
        hits = torch.zeros_like(affinity).scatter_(-1, top, 1.0)
        real = affinity.new_ones(affinity.shape[:2]) if real is None else real.to(affinity.dtype)
        share = (real / real.sum(dim=1, keepdim=True).clamp(min=1))[..., None]  # (B, T, 1), the 1 / T
        f = (hits * share).sum(dim=1) * (a.n_routed_experts / a.n_activated_experts)  # (B, E)
        p = (affinity / affinity.sum(dim=-1, keepdim=True) * share).sum(dim=1)
        return a.seq_aux_alpha * (f * p).sum(dim=-1).mean()

    @torch.no_grad()
    def update_bias(self, load):
        """Move the bias of each expert by gamma: up when it carried less than the mean load (E,), down when more."""
        self.routing_bias += self.args.bias_update_speed * (load.mean() - load).sign()


class Block(nn.Module):
    """Attention and feed-forward, each on a normed copy of the stream. Returns the stream and, of a mixture, its load
    (E,) and balance loss, else None twice."""

    def __init__(self, args, layer, moe):
        super().__init__()
        self.attn_norm = RMSNorm(args.dim, args.norm_eps)
        self.attn = LatentAttention(args, layer)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn = MoE(args) if moe else SwiGLU(args.dim, args.inter_dim)

    def forward(self, x, rope, mask, state=None, real=None):
        x = x + self.attn(self.attn_norm(x), rope, mask, state)
        if isinstance(self.ffn, MoE):
            out, load, balance = self.ffn(self.ffn_norm(x), state is not None, real)
            return x + out, load, balance
        return x + self.ffn(self.ffn_norm(x)), None, None


class MTPModule(nn.Module):
    """Depth k of multi-token prediction (equations 21-23): from position i's output of depth k - 1 and token i + k."""

    def __init__(self, args, depth):
        super().__init__()
        self.embed_norm = RMSNorm(args.dim, args.norm_eps)
        self.hidden_norm = RMSNorm(args.dim, args.norm_eps)
        self.proj = nn.Linear(2 * args.dim, args.dim, bias=False)  # M_k
        self.block = Block(args, layer=depth, moe=args.n_dense_layers < args.n_layers)
        self.norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, hidden, embedded, rope, mask, state=None, real=None):
        x = self.proj(torch.cat((self.embed_norm(embedded), self.hidden_norm(hidden)), dim=-1))
        x, load, balance = self.block(x, rope, mask, state, real)
        return self.norm(x), load, balance


def hf_names(args):
    """Patterns of our names and what stands there in the published ones; the MTP modules are further layers there."""
    names = {"^tok_embed": "model.embed_tokens", "^norm": "model.norm", "^layers": "model.layers"}
    for k, layer in enumerate(range(args.n_layers, args.n_layers + args.n_mtp_layers)):
        for ours, theirs in ("embed_norm", "enorm"), ("hidden_norm", "hnorm"), ("proj", "eh_proj"):
            names[f"^mtp.{k}.{ours}"] = f"model.layers.{layer}.{theirs}"
        names[f"^mtp.{k}.norm"] = f"model.layers.{layer}.shared_head.norm"
        names[f"^mtp.{k}.block"] = f"model.layers.{layer}"
    return names | {
        ".attn_norm.": ".input_layernorm.",
        ".attn.": ".self_attn.",
        ".ffn_norm.": ".post_attention_layernorm.",
        ".q_a_norm.": ".q_a_layernorm.",
        ".kv_a_norm.": ".kv_a_layernorm.",
        ".kv_a_proj.": ".kv_a_proj_with_mqa.",
        ".ffn.router": ".mlp.gate.weight",
        ".ffn.routing_bias": ".mlp.gate.e_score_correction_bias",
        ".ffn.shared.": ".mlp.shared_experts.",
        ".ffn.(gate|up|down)_proj$": r".mlp.experts.*.\1_proj.weight",
        ".ffn.": ".mlp.",
    }


def hf_copies(args):
    """Each published MTP module repeats the embeddings and the output head."""
    head = "model.embed_tokens.weight" if args.tie_embeddings else "lm_head.weight"
    layers = [f"model.layers.{i}" for i in range(args.n_layers, args.n_layers + args.n_mtp_layers)]
    return {f"{layer}.embed_tokens.weight": "model.embed_tokens.weight" for layer in layers} | {
        f"{layer}.shared_head.head.weight": head for layer in layers
    }


def hf_rows(args):
    """The published rotary pairs are neighbours."""
    q = interleaved_rows(args.n_heads, args.qk_nope_head_dim, args.qk_rope_head_dim)
    kv = interleaved_rows(1, args.kv_lora_rank, args.qk_rope_head_dim)
    return {".q_proj.weight": q, ".q_b_proj.weight": q, ".kv_a_proj.weight": kv}


class DeepSeekV3Model(BaseModel):
    model_name = "mini_deepseekv3"
    hf_layout = Layout(
        args=DeepSeekV3ModelArgs,
        architecture="DeepseekV3ForCausalLM",
        model_type="deepseek_v3",
        fields=dict(
            vocab_size="vocab_size",
            max_seq_len="max_position_embeddings",
            dim="hidden_size",
            n_layers="num_hidden_layers",
            n_dense_layers="first_k_dense_replace",
            n_heads="num_attention_heads",
            q_lora_rank="q_lora_rank",
            kv_lora_rank="kv_lora_rank",
            qk_nope_head_dim="qk_nope_head_dim",
            qk_rope_head_dim="qk_rope_head_dim",
            v_head_dim="v_head_dim",
            inter_dim="intermediate_size",
            moe_inter_dim="moe_intermediate_size",
            n_routed_experts="n_routed_experts",
            n_shared_experts="n_shared_experts",
            n_activated_experts="num_experts_per_tok",
            n_expert_groups="n_group",
            n_limited_groups="topk_group",
            norm_topk="norm_topk_prob",
            route_scale="routed_scaling_factor",
            n_mtp_layers="num_nextn_predict_layers",
            norm_eps="rms_norm_eps",
            tie_embeddings="tie_word_embeddings",
        ),
        only_ours=("bias_update_speed", "seq_aux_alpha", "mtp_loss_weight"),
        fixed=dict(
            hidden_act="silu",
            attention_bias=False,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            moe_layer_freq=1,
            rope_interleave=True,
        ),
        absent=dict(
            q_lora_rank=0,
            n_shared_experts=0,
            n_group=1,
            topk_group=1,
            num_nextn_predict_layers=0,
            tie_word_embeddings=False,
        ),
        names=hf_names,
        copies=hf_copies,
        rows=hf_rows,
    )

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

    def draft(self, hidden, ids, state):
        """The first module as a draft model (section 2.2.3), by the contract's `draft`."""
        positions = token_positions(ids, state)
        mask = attention_mask(positions, state)
        hidden = self.mtp[0](hidden, self.tok_embed(ids), self.rotary(positions), mask, state)[0]
        return self.lm_head(hidden[:, -1:] if state.last_only else hidden), hidden

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        self.check_length(input_ids)
        positions = token_positions(input_ids, state)
        rope = self.rotary(positions)
        mask = packed_mask(positions, state, doc_ids)
        real = None if doc_ids is None else doc_ids >= 0  # (B, T), not padding

        embedded = x = self.tok_embed(input_ids)  # (B, T, D)
        loads, balances = [], []
        for layer in self.layers:
            x, load, balance = layer(x, rope, mask, state, real)
            if load is not None:
                loads.append(load)
            if balance is not None:
                balances.append(balance)
        x = self.norm(x)
        other_vars = {"moe/load": torch.stack(loads).detach()} if loads else {}  # (L, E)

        if targets is None:
            if state is not None:
                state.hidden = x
                x = x[:, -1:] if state.last_only else x
            return self.lm_head(x), None, other_vars

        other_vars["loss/ce"] = lm_loss(x, self.lm_head.weight, targets)
        if self.mtp:
            self._predict_further(x, embedded, targets, doc_ids, balances, other_vars)
        if balances:
            other_vars["loss/balance"] = torch.stack(balances).sum()
        return None, sum(v for k, v in other_vars.items() if k.startswith("loss/")), other_vars

    def _predict_further(self, x, embedded, targets, doc_ids, balances, other_vars):
        """Add the multi-token prediction loss (equations 24-25) and the modules' loads to `other_vars`.

        At depth k position i stands for token i and knows tokens up to i + k; it predicts token i + k + 1, which is
        `targets` moved by k. A pair whose two ends lie in different documents predicts nothing.
        """
        losses, loads, hits, seen = [], [], 0, 0
        n_targets = (targets != -100).sum().clamp(min=1)
        for k, module in enumerate(self.mtp, start=1):
            n = targets.shape[1] - k  # positions that still have a token i + k
            if n < 1:
                break
            target = targets[:, k:]
            docs = None if doc_ids is None else doc_ids[:, :n]
            if docs is not None:
                target = target.masked_fill(docs != doc_ids[:, k:], -100)
            positions = token_positions(target)
            mask = packed_mask(positions, doc_ids=docs)
            real = docs if docs is None else docs >= 0
            x, load, balance = module(x[:, :n], embedded[:, k:], self.rotary(positions), mask, real=real)
            # Both equations divide by the T of the whole sequence, so a depth weighs by the targets that it has left.
            share = (target != -100).sum() / n_targets
            losses.append(lm_loss(x, self.lm_head.weight, target) * share)
            with torch.no_grad():  # how often it is right, from a part of the positions: no second output head
                some = target[:, ::MTP_ACCURACY_STRIDE]
                hits += (F.linear(x[:, ::MTP_ACCURACY_STRIDE], self.lm_head.weight).argmax(dim=-1) == some).sum()
                seen += (some != -100).sum()
            if load is not None:
                loads.append(load)
                balances.append(balance)
        if losses:
            other_vars["mtp/accuracy"] = hits / seen.clamp(min=1)
            other_vars["loss/mtp"] = self.args.mtp_loss_weight * torch.stack(losses).sum() / len(self.mtp)
        if loads:
            other_vars["moe/load_mtp"] = torch.stack(loads).detach()  # (D, E)

    after_step_keeps_to_buffers = True

    def after_step(self, other_vars):
        """Move every routing bias by the load of the step (2.1.2, auxiliary-loss-free load balancing)."""
        for key, blocks in (("moe/load", self.layers), ("moe/load_mtp", [m.block for m in self.mtp])):
            mixtures = [block.ffn for block in blocks if isinstance(block.ffn, MoE)]
            if key in other_vars:
                for mixture, load in zip(mixtures, other_vars[key], strict=True):
                    mixture.update_bias(load)

    def param_groups(self):
        """As every model, but the routers count as scalars: they are read row by row, not as a map of the stream."""
        groups = super().param_groups()
        routers = {id(m.router) for m in self.modules() if isinstance(m, MoE)}
        groups["scalar"] += [p for p in groups["matrix"] if id(p) in routers]
        groups["matrix"] = [p for p in groups["matrix"] if id(p) not in routers]
        return groups

    def num_params(self):
        """Return {"total", "active", "embedding"}; active: without the unchosen experts and the MTP modules, which
        only training uses."""
        counts = super().num_params()
        counts["active"] -= sum(p.numel() for p in self.mtp.parameters())
        counts["active"] -= sum(self._unchosen(block) for block in self.layers)
        return counts

    def _unchosen(self, block):
        if not isinstance(block.ffn, MoE):
            return 0
        a = self.args
        return (a.n_routed_experts - a.n_activated_experts) * 3 * a.dim * a.moe_inter_dim

    def attention_flops_per_token(self, seq_len):
        """Return the forward FLOPs of scores and values of all layers, expanded form, MTP modules included."""
        a = self.args
        width = a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)
        return 2 * seq_len * (a.n_layers + a.n_mtp_layers) * width

    def flops_per_token(self, seq_len):
        """As every model, plus in each MTP module its active weights and another use of the output head."""
        a = self.args
        mtp = sum(sum(p.numel() for p in m.parameters()) - self._unchosen(m.block) for m in self.mtp)
        return super().flops_per_token(seq_len) + 6 * (mtp + a.n_mtp_layers * a.vocab_size * a.dim)

    def to_hf(self):
        config, tensors = super().to_hf()
        a = self.args
        return config | {"num_key_value_heads": a.n_heads, "q_lora_rank": a.q_lora_rank or None}, tensors

    @classmethod
    def from_hf(cls, config, tensors):
        if not any(name.startswith(f"model.layers.{config.get('num_hidden_layers')}.") for name in tensors):
            config = {**config, "num_nextn_predict_layers": 0}  # promised, but transformers saves none
        return super().from_hf(config, tensors)
