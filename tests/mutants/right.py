"""A small transformer, right in every way, in pieces that a mutant can replace; and the registry of mutants."""

from dataclasses import dataclass, make_dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model.basemodel import BaseModel, BaseModelArgs
from model.layers import CausalConv, RMSNorm, rotate, sink_attention, token_positions, window_append, window_mask

WRONG = {}  # {class name: (Model, ModelArgs, the check that must catch it)}
SLOW_MUTANTS = set()  # names of those whose check takes seconds; the quick tests have faster ones of the same kind
UNUSUAL = {}  # {class name: (Model, ModelArgs)}
SLOW_UNUSUAL = set()  # names of those that run in the slow tests only


@dataclass
class RightModelArgs(BaseModelArgs):
    vocab_size: int = 97
    max_seq_len: int = 24
    dim: int = 32
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 8
    inter_dim: int = 48


@dataclass
class MoEModelArgs(RightModelArgs):
    moe_inter_dim: int = 20
    n_routed_experts: int = 6
    n_activated_experts: int = 2
    bias_update_speed: float = 0.01
    balance_weight: float = 0.01


def with_defaults(ModelArgs, **defaults):
    """Return the args class with other defaults."""
    fields = [(name, type(value), value) for name, value in defaults.items()]
    return make_dataclass(ModelArgs.__name__, fields, bases=(ModelArgs,))


def mutant(caught_by, ModelArgs=None, slow=False):
    """Register a model with one bug, and the check that must catch it. slow: for the slow tests."""

    def register(Model):
        assert Model.__name__ not in WRONG, f"two models are called {Model.__name__}"
        WRONG[Model.__name__] = (Model, ModelArgs or Model.Args, caught_by)
        if slow:
            SLOW_MUTANTS.add(Model.__name__)
        return Model

    return register


def unusual(Model, slow=False):
    """Register a model that is right and must pass every check. slow: in the slow tests."""
    assert Model.__name__ not in UNUSUAL, f"two models are called {Model.__name__}"
    UNUSUAL[Model.__name__] = (Model, Model.Args)
    if slow:
        SLOW_UNUSUAL.add(Model.__name__)
    return Model


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, by hand."""

    def __init__(self, args, layer):
        super().__init__()
        self.args, self.layer = args, layer
        self.q_proj = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.k_proj = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.v_proj = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.o_proj = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x, positions, state, doc_ids):
        q, k, v = (proj(x).unflatten(-1, (-1, self.args.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.turn(q, positions), self.turn(k, positions)
        if state is not None:
            k, v = self.remember(state, k, v, positions)
        return self.o_proj(self.mix(q, k, v, self.visible(positions, k.shape[1], state, doc_ids)).flatten(-2))

    def turn(self, x, positions):
        half = self.args.head_dim // 2
        angles = positions[..., None].float() * 100.0 ** (-torch.arange(half, device=x.device) / half)
        return rotate(x, angles.cos()[:, :, None], angles.sin()[:, :, None])

    def remember(self, state, k, v, positions):
        return self.append(state, "k", k, positions), self.append(state, "v", v, positions)

    def append(self, state, name, new, positions):
        cache = state.layers[self.layer]
        if name not in cache:
            cache[name] = new.new_zeros(new.shape[0], state.max_len, *new.shape[2:])
        cache[name][torch.arange(len(new))[:, None], positions] = new
        return cache[name][:, : state.max_pos + new.shape[1]]

    def visible(self, positions, n_keys, state, doc_ids):
        seen = torch.arange(n_keys, device=positions.device) <= positions[..., None]  # (1|B, T, S)
        if doc_ids is not None:
            seen = seen & (doc_ids[:, :, None] == doc_ids[:, None, :])
        return seen

    def mix(self, q, k, v, visible):
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        scores = torch.einsum("bthk,bshk->bhts", q, k).float() * self.args.head_dim**-0.5
        weights = self.weights(scores.masked_fill(~visible[:, None], -1e9))
        return torch.einsum("bhts,bshk->bthk", weights.to(v.dtype), v)

    def weights(self, scores):
        return scores.softmax(dim=-1)


class FeedForward(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.up_proj = nn.Linear(args.dim, args.inter_dim, bias=False)
        self.down_proj = nn.Linear(args.inter_dim, args.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.up_proj(x)))


class MoE(nn.Module):
    """Sigmoid-routed experts in a plain loop, with a routing bias and a balance loss."""

    def __init__(self, args):
        super().__init__()
        a = self.args = args
        self.router = nn.Linear(a.dim, a.n_routed_experts, bias=False)
        self.up_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.moe_inter_dim, a.dim))
        self.down_proj = nn.Parameter(torch.empty(a.n_routed_experts, a.dim, a.moe_inter_dim))
        self.make_bias()

    def make_bias(self):
        self.register_buffer("routing_bias", torch.zeros(self.args.n_routed_experts))

    def forward(self, x, doc_ids=None):
        tokens = x.flatten(0, 1)  # (N, D)
        scores = self.score(tokens)  # (N, E)
        chosen = self.choose(scores.detach())  # (N, A)
        weights = self.weigh(scores, chosen)
        out = torch.zeros_like(tokens)
        for expert in range(self.args.n_routed_experts):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            h = self.expert(tokens[token], expert)
            out = out.index_add(0, token, (h * weights[token, slot, None]).to(out.dtype))
        kept = [self.without_padding(each, doc_ids) for each in (chosen, scores)]
        return out.view_as(x), self.count(*kept), self.balance(*self.of_balance(scores, chosen, doc_ids))

    def of_balance(self, scores, chosen, doc_ids):
        return self.without_padding(scores, doc_ids), self.without_padding(chosen, doc_ids)

    def expert(self, tokens, number):
        return F.silu(tokens @ self.up_proj[number].T) @ self.down_proj[number].T

    def without_padding(self, chosen, doc_ids):
        return chosen if doc_ids is None else chosen[doc_ids.flatten() >= 0]

    def score(self, tokens):
        return self.router(tokens).float().sigmoid()

    def choose(self, scores):
        return (scores + self.routing_bias).topk(self.args.n_activated_experts, dim=-1).indices

    def weigh(self, scores, chosen):
        weights = scores.gather(1, chosen)
        return weights / weights.sum(dim=-1, keepdim=True)

    def count(self, chosen, scores):
        return torch.bincount(chosen.flatten(), minlength=self.args.n_routed_experts).float()

    def balance(self, scores, chosen):
        n_tokens = max(1, len(chosen))
        share = F.one_hot(chosen, self.args.n_routed_experts).float().sum(dim=(0, 1)) / n_tokens
        return self.args.balance_weight * (share * (scores / scores.sum(-1, keepdim=True)).sum(dim=0) / n_tokens).sum()

    @torch.no_grad()
    def update_bias(self, load):
        self.routing_bias += self.args.bias_update_speed * (load.mean() - load).sign()


class Block(nn.Module):
    """Returns the stream and, from an MoE layer, its load and balance loss."""

    def __init__(self, model, args, layer):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(args.dim), model.Attention(args, layer)
        self.ffn_norm, self.ffn = RMSNorm(args.dim), model.FFN(args)

    def forward(self, x, positions, state, doc_ids):
        x = x + self.attn(self.attn_norm(x), positions, state, doc_ids)
        h = self.ffn_norm(x)
        out = self.ffn(h, doc_ids) if isinstance(self.ffn, MoE) else self.ffn(h)
        out, *reports = out if isinstance(out, tuple) else (out,)
        return (x + out, *reports)


class RightModel(BaseModel):
    Args, Attention, FFN, Block = RightModelArgs, Attention, FeedForward, Block

    def __init__(self, args):
        super().__init__(args)
        self.tok_embed = nn.Embedding(args.vocab_size, args.dim)
        self.layers = self.make_layers()
        self.norm = RMSNorm(args.dim)
        self.lm_head = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.make_more()
        self.init_weights()

    def make_layers(self):
        return nn.ModuleList(self.Block(self, self.args, layer) for layer in range(self.args.n_layers))

    def make_more(self):
        pass

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        self.check_length(input_ids)
        positions = token_positions(input_ids, state)
        x, loads, balances = self.embed(input_ids, positions, targets, doc_ids), [], []
        x = self.add_more(x, input_ids, state, doc_ids)
        for layer in self.layers:
            x, *reports = layer(x, positions, state, doc_ids)
            if reports:
                loads.append(reports[0])
                balances.append(reports[1])
        loads = [load for load in loads if load is not None]
        logits = self.head(x, state)
        other_vars = {"moe/load": torch.stack(loads).detach()} if loads else {}
        if targets is None:
            return logits, None, other_vars
        return logits, *self.losses(logits, targets, balances, other_vars)

    def embed(self, input_ids, positions, targets, doc_ids):
        return self.tok_embed(input_ids)

    def add_more(self, x, input_ids, state, doc_ids):
        return x

    def head(self, x, state):
        if state is not None and state.last_only:
            x = x[:, -1:]
        return self.lm_head(self.norm(x))

    def losses(self, logits, targets, balances, other_vars):
        other_vars = {**other_vars, "loss/ce": self.cross_entropy(logits, targets)}
        if balances:
            other_vars["loss/balance"] = torch.stack(balances).sum()
        return sum(v for k, v in other_vars.items() if k.startswith("loss/")), other_vars

    def cross_entropy(self, logits, targets):
        total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        return total / (targets != -100).sum().clamp(min=1)


class WithoutAttention(RightModel):
    """For layers that mix the tokens in another way: no flops of attention."""

    def attention_flops_per_token(self, seq_len):
        return 0


class WindowedAttention(Attention):
    """A short convolution of the inputs, then attention within a window and with a sink, by the shared layers."""

    window = 5

    def __init__(self, args, layer):
        super().__init__(args, layer)
        self.conv = CausalConv(args.dim, 3)
        self.sink = nn.Parameter(torch.zeros(args.n_heads))

    def forward(self, x, positions, state, doc_ids):
        x = x + self.conv(x, state, self.layer, doc_ids=doc_ids)
        q, k, v = (proj(x).unflatten(-1, (-1, self.args.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.turn(q, positions), self.turn(k, positions)
        if state is not None:
            k, v = (window_append(state, self.layer, name, new, self.window) for name, new in (("k", k), ("v", v)))
        mask = self.visible_keys(positions, state, doc_ids)
        return self.o_proj(sink_attention(q, k, v, self.sink, mask).flatten(-2))

    def visible_keys(self, positions, state, doc_ids):
        return window_mask(positions, state, doc_ids, self.window)


class WindowsAndTails(RightModel):
    Attention = WindowedAttention


class MoEModel(RightModel):
    Args, FFN = MoEModelArgs, MoE

    def after_step(self, other_vars):
        for layer, load in zip(self.layers, other_vars["moe/load"]):
            layer.ffn.update_bias(load)

    def num_params(self):
        counts, a = super().num_params(), self.args
        idle = (a.n_routed_experts - a.n_activated_experts) * 2 * a.dim * a.moe_inter_dim
        counts["active"] -= a.n_layers * idle
        return counts
