"""DeepSeek-V3 (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2), small.

A pre-norm decoder with multi-head latent attention (2.1.1), DeepSeekMoE whose load is balanced by a bias on the choice
of experts (2.1.2), and multi-token prediction (2.2) by small sequential modules that only training uses.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.basemodel import MOE_LOAD, BaseModel, BaseModelArgs, State, require
from model.hf.deepseekv3 import layout
from model.layers.attention import attention, cache_append, matmul, packed_mask
from model.layers.embedding import Embedding
from model.layers.feed_forward import SwiGLU
from model.layers.loss import lm_loss
from model.layers.moe import expert_load, expert_swiglu
from model.layers.norm import RMSNorm
from model.layers.rotary import RopeArgs, Rotary, rotate, token_positions, yarn_mscale


@dataclass
class DeepSeekV3ModelArgs(RopeArgs, BaseModelArgs):
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 12
    n_dense_layers: int = 1  # the first layers have a dense feed-forward
    n_heads: int = 12  # H
    q_lora_rank: int = 384  # d_c', rank of the query latent; 0 = queries straight from the residual stream
    kv_lora_rank: int = 192  # d_c = R, rank of the latent that keys and values share
    qk_nope_head_dim: int = 64  # d_h, head dim without positions
    qk_rope_head_dim: int = 32  # d_h^R, head dim with rotary positions; its key is shared by all heads
    v_head_dim: int = 64
    inter_dim: int = 2048  # F of the dense layers
    moe_inter_dim: int = 512  # F of one expert
    n_routed_experts: int = 8  # N_r = E
    n_shared_experts: int = 1  # N_s, used by every token
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
        experts, groups, limited = self.n_routed_experts, self.n_expert_groups, self.n_limited_groups
        require(experts % groups == 0, f"n_routed_experts={experts} must be a multiple of n_expert_groups={groups}")
        require(1 <= limited <= groups, f"n_limited_groups={limited} must lie in 1..{groups}")
        active, usable = self.n_activated_experts, limited * (experts // groups)
        require(
            active <= usable, f"n_activated_experts={active} must lie in 1..{usable}, the experts of {limited} groups"
        )
        require(groups == 1 or experts // groups > 1, "a group is scored by its two best experts: use at least 2 each")
        require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim must be even, rotary positions turn pairs: change it")
        self.check_rope()


class TokenInfo(NamedTuple):
    """Inputs of every block: cos and sin, visible keys, token mask (B, T; False = padding), state."""

    rope: tuple
    mask: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None
    state: State | None = None


class LatentAttention(nn.Module):
    """Multi-head latent attention (2.1.1, equations 1-11).

    Training and a first prompt expand the latent into keys and values of all heads. Decoding keeps only the latent and
    the rotary key, R + d_h^R elements per token, and moves the up-projections: q (W_UK c) = (q W_UK) c, and sum_s a_s
    (W_UV c_s) = W_UV (sum_s a_s c_s), which is attention with one shared key-value head of width R.
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
            self.q_a_norm = RMSNorm(a.q_lora_rank, eps=1e-6)  # no setting in the published code
            self.q_b_proj = nn.Linear(a.q_lora_rank, a.n_heads * qk_head_dim, bias=False)  # W^UQ, W^QR
        else:
            self.q_proj = nn.Linear(a.dim, a.n_heads * qk_head_dim, bias=False)
        self.kv_a_proj = nn.Linear(a.dim, a.kv_lora_rank + a.qk_rope_head_dim, bias=False)  # W^DKV, W^KR
        self.kv_a_norm = RMSNorm(a.kv_lora_rank, eps=1e-6)
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
        mixed = attention(q, seen[:, :, None], seen[:, :, None, : a.kv_lora_rank], mask, self.scale)  # (B, T, H, R)
        return matmul(mixed.transpose(1, 2), up_v.mT).transpose(1, 2)  # (B, T, H, v)


class MoE(nn.Module):
    """DeepSeekMoE (2.1.2, equations 12-20). (B, T, D) -> (B, T, D), load (E,), balance loss (None while decoding)."""

    expert_weights = ("gate_proj", "up_proj", "down_proj")
    scalar_params = ("router",)  # each row is a vector of its own, not a map of the stream

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
        out = expert_swiglu(tokens, chosen, weight, self.gate_proj, self.up_proj, self.down_proj).view_as(x)
        if self.shared is not None:
            out = out + self.shared(x)
        if info.state is not None:
            return out, load.float(), None
        return out, load.float(), self._balance_loss(affinity.view(*x.shape[:2], -1), info.token_mask)

    def _choose(self, affinity):
        """Return the best experts (N, A) by affinity + bias (equation 16), from the groups whose two best are best."""
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


class Block(nn.Module):
    """Attention and feed-forward, each on a normed copy of the stream. (B, T, D) -> (B, T, D), [(load, balance)]."""

    def __init__(self, args, layer, moe):
        super().__init__()
        self.attn_norm = RMSNorm(args.dim, args.norm_eps)
        self.attn = LatentAttention(args, layer)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn = MoE(args) if moe else SwiGLU(args.dim, args.inter_dim)

    def forward(self, x, info):
        x = x + self.attn(self.attn_norm(x), info)
        if not isinstance(self.ffn, MoE):
            return x + self.ffn(self.ffn_norm(x)), []
        out, load, balance = self.ffn(self.ffn_norm(x), info)
        return x + out, [(load, balance)]


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
            stats += of_layer
        x = self.norm(x)
        other_vars = {MOE_LOAD: torch.stack([load for load, _ in stats]).detach()} if stats else {}  # (L, E)
        if targets is None:
            if state is not None:
                state.hidden = x
                x = x[:, -1:] if state.last_only else x
            return self.lm_head(x), None, other_vars
        squares = [] if self.z_loss else None
        other_vars["loss/ce"] = lm_loss(x, self.lm_head.weight, targets, squares=squares)
        other_vars |= self._predict_further(x, embedded, targets, doc_ids, squares, stats)
        if stats:
            other_vars["loss/balance"] = torch.stack([balance for _, balance in stats]).sum()
        if squares:
            other_vars["loss/z"] = self.z_loss * sum(squares)
        return None, sum(term for name, term in other_vars.items() if name.startswith("loss/")), other_vars

    def _predict_further(self, x, embedded, targets, doc_ids, squares, stats):
        """Return the multi-token prediction loss (equations 24-25) in other_vars; add the modules' stats to `stats`.

        At depth k position i knows tokens up to i + k, and predicts token i + k + 1: `targets` moved by k. A pair whose
        two ends lie in different documents predicts nothing.
        """
        losses = []
        hits, seen = 0, 0
        n_stats = len(stats)
        n_targets = (targets != -100).sum().clamp(min=1)
        for k, module in zip(range(1, targets.shape[1]), self.mtp):
            target, docs = targets[:, k:], None
            if doc_ids is not None:
                docs = doc_ids[:, :-k]
                target = target.masked_fill(docs != doc_ids[:, k:], -100)
            x, of_module = module(x[:, :-1], embedded[:, k:], self.token_info(target, doc_ids=docs))
            stats += of_module
            # Both equations divide by the T of the full sequence, so a depth is weighted by its remaining targets.
            share = (target != -100).sum() / n_targets
            losses.append(lm_loss(x, self.lm_head.weight, target, squares=squares) * share)
            with torch.no_grad():  # accuracy at every 16th position, which avoids a second full pass of the output head
                sample = target[:, ::16]
                hits += (F.linear(x[:, ::16], self.lm_head.weight).argmax(dim=-1) == sample).sum()
                seen += (sample != -100).sum()
        if not losses:
            return {}
        loss = self.args.mtp_loss_weight * torch.stack(losses).sum() / len(self.mtp)
        loads = [load for load, _ in stats[n_stats:]]
        load = {"moe/load_mtp": torch.stack(loads).detach()} if loads else {}
        return {"mtp/accuracy": hits / seen.clamp(min=1), "loss/mtp": loss, **load}

    def draft(self, hidden, ids, state):
        """The first module as a draft model (section 2.2.3)."""
        hidden, _ = self.mtp[0](hidden, self.tok_embed(ids), self.token_info(ids, state))
        return self.lm_head(hidden[:, -1:] if state.last_only else hidden), hidden

    def after_step(self, other_vars):
        """Move every routing bias by gamma: up for an expert below the mean load of the step, down for one above it."""
        moes = [module for module in self.modules() if isinstance(module, MoE)]  # the layers', then the MTP modules'
        loads = [load for key in (MOE_LOAD, "moe/load_mtp") for load in other_vars.get(key, ())]
        for moe, load in zip(moes, loads):
            moe.routing_bias += self.args.bias_update_speed * (load.mean() - load).sign()

    def num_params(self):
        """As for every model; active: without the unchosen experts and the MTP modules, which only training uses."""
        return super().num_params() | {"active": self._active(self) - self._active(self.mtp)}

    def _active(self, module):
        """Return how many parameters of `module` a token uses: not those of the experts that it does not choose."""
        a = self.args
        unchosen = (a.n_routed_experts - a.n_activated_experts) * 3 * a.dim * a.moe_inter_dim
        total = sum(p.numel() for p in module.parameters())
        return total - unchosen * sum(isinstance(m, MoE) for m in module.modules())

    def attention_flops_per_token(self, seq_len):
        """Return the forward FLOPs of scores and values of all layers, expanded form, MTP modules included."""
        a = self.args
        width = a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)
        return 2 * seq_len * (a.n_layers + a.n_mtp_layers) * width

    def flops_per_token(self, seq_len):
        """As for every model, plus in each MTP module its active weights and another use of the output head."""
        heads = self.args.n_mtp_layers * self.args.vocab_size * self.args.dim
        return super().flops_per_token(seq_len) + 6 * (self._active(self.mtp) + heads)
