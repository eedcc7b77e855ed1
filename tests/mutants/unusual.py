"""Correct architectures unlike the usual transformer: every check must pass."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.basemodel import BaseModel, BaseModelArgs
from model.layers import RMSNorm, lm_loss

from .right import (
    Attention,
    Block,
    FeedForward,
    MoE,
    MoEModel,
    MoEModelArgs,
    RightModel,
    RightModelArgs,
    WindowsAndTails,
    WithoutAttention,
    unusual,
    with_defaults,
)
from .wrong_state import CarriesAMean

unusual(RightModel)
unusual(MoEModel)
unusual(WindowsAndTails)


@unusual
class RunningMean(WithoutAttention):
    Attention = CarriesAMean


@unusual
class NoPositions(RightModel):
    class Attention(Attention):
        def turn(self, x, positions):
            return x


@unusual
class LearnedPositions(RightModel):
    """GPT-2's: a table, a bias of queries (a softmax cancels that of keys), positions from 0 in each document."""

    class Attention(Attention):
        def __init__(self, args, layer):
            super().__init__(args, layer)
            self.q_bias = nn.Parameter(torch.zeros(args.head_dim))

        def mix(self, q, k, v, visible):
            return super().mix(q + self.q_bias, k, v, visible)

        def turn(self, x, positions):
            return x

    def make_more(self):
        self.pos_embed = nn.Embedding(self.args.max_seq_len, self.args.dim)

    def embed(self, input_ids, positions, targets, doc_ids):
        if doc_ids is not None:
            starts = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0)) * positions
            positions = positions - starts.cummax(dim=1).values
        return self.tok_embed(input_ids) + self.pos_embed(positions)


@unusual
class MultiQuery(RightModel):
    Args = with_defaults(RightModelArgs, n_kv_heads=1)


@unusual
class Parallel(RightModel):
    """Attention and feed-forward side by side (GPT-J)."""

    class Block(Block):
        def __init__(self, model, args, layer):
            super().__init__(model, args, layer)
            del self.ffn_norm

        def forward(self, x, positions, state, doc_ids):
            normed = self.attn_norm(x)
            return (x + self.attn(normed, positions, state, doc_ids) + self.ffn(normed),)


@unusual
class PostNorm(RightModel):
    class Block(Block):
        def forward(self, x, positions, state, doc_ids):
            x = self.attn_norm(x + self.attn(x, positions, state, doc_ids))
            return (self.ffn_norm(x + self.ffn(x)),)


@unusual
class SharedLayers(RightModel):
    """ALBERT's: one block, used again and again, without self.layers and without a cache."""

    def make_layers(self):
        self.block = Block(self, self.args, 0)
        return [self.block] * 3

    def forward(self, input_ids, targets=None, doc_ids=None):
        return super().forward(input_ids, targets, None, doc_ids)


@unusual
class ZeroInitialised(RightModel):
    """Projections into the stream start at zero, a learned scale does too; logits are capped."""

    class Block(Block):
        def __init__(self, model, args, layer):
            super().__init__(model, args, layer)
            self.scale = nn.Parameter(torch.zeros(args.dim))

        def forward(self, x, positions, state, doc_ids):
            x = x + self.attn(self.attn_norm(x), positions, state, doc_ids)
            return (x + self.scale * self.ffn(self.ffn_norm(x)),)

    def init_weights(self):
        super().init_weights()
        for layer in self.layers:
            nn.init.zeros_(layer.attn.o_proj.weight)
        nn.init.zeros_(self.lm_head.weight)

    def head(self, x, state):
        return 30 * (super().head(x, state) / 30).tanh()


@unusual
class TiedAndScaled(RightModel):
    """Gemma's: a tied table, the stream scaled by sqrt(D); a z-loss."""

    def make_more(self):
        self.lm_head.weight = self.tok_embed.weight

    def embed(self, input_ids, positions, targets, doc_ids):
        return self.tok_embed(input_ids) * self.args.dim**0.5

    def losses(self, logits, targets, balances, other_vars):
        ce = self.cross_entropy(logits, targets)
        z = 1e-4 * logits.float().logsumexp(dim=-1).square().mean()
        accuracy = (logits.argmax(dim=-1) == targets).float().mean()
        return ce + z, {"loss/main": ce, "loss/z": z, "accuracy": accuracy}


@unusual
class TrainsWithDropout(RightModel):
    class FFN(FeedForward):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.2, self.training)


@unusual
class OneExpert(MoEModel):
    """Switch's: one active expert by a softmax, its weight not normalised, no routing bias, a ModuleList of experts."""

    Args = with_defaults(MoEModelArgs, n_activated_experts=1)

    class FFN(MoE):
        def __init__(self, args):
            super().__init__(args)
            del self.routing_bias, self.up_proj, self.down_proj
            self.experts = nn.ModuleList(FeedForward(args) for _ in range(args.n_routed_experts))

        def forward(self, x, doc_ids=None):
            scores = self.router(x).float().softmax(dim=-1)
            weight, chosen = scores.max(dim=-1)
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                here = chosen == number
                if here.any():
                    out[here] = (expert(x[here]) * weight[here][:, None]).to(out.dtype)
            flat = chosen.flatten()[:, None]
            load = self.count(self.without_padding(flat, doc_ids), scores)
            return out, load, self.balance(*self.of_balance(scores.flatten(0, 1), flat, doc_ids))

    def after_step(self, other_vars):
        pass

    def num_params(self):
        counts, a = BaseModel.num_params(self), self.args
        counts["active"] -= a.n_layers * (a.n_routed_experts - 1) * 2 * a.dim * a.inter_dim
        return counts


@dataclass
class BareModelArgs(BaseModelArgs):
    hidden: int = 40
    repeats: int = 2
    kernel: int = 3


class CausalConvolution(nn.Module):
    def __init__(self, hidden, kernel):
        super().__init__()
        self.norm = RMSNorm(hidden)
        self.conv = nn.Conv1d(hidden, 2 * hidden, kernel)

    def forward(self, x):  # (B, T, D)
        h = F.pad(self.norm(x).transpose(1, 2), (self.conv.kernel_size[0] - 1, 0))
        a, b = self.conv(h).transpose(1, 2).chunk(2, dim=-1)
        return x + a * b.sigmoid()


@unusual
class Convolutions(BaseModel):
    """Gated causal convolutions, no attention; only what is required, and names of its own."""

    Args = BareModelArgs

    def __init__(self, args):
        super().__init__(args)
        self.table = nn.Embedding(args.vocab_size, args.hidden)
        self.convolutions = nn.Sequential(*(CausalConvolution(args.hidden, args.kernel) for _ in range(args.repeats)))
        self.out_norm = RMSNorm(args.hidden)
        self.out = nn.Linear(args.hidden, args.vocab_size)
        self.init_weights()

    def forward(self, input_ids, targets=None):
        x = self.out_norm(self.convolutions(self.table(input_ids)))
        if targets is None:
            return self.out(x), None, {}
        logits = self.out(x)
        valid = (targets != -100).sum().clamp(min=1)
        loss = F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="sum") / valid
        return logits, loss, {}


class GatedRecurrence(nn.Module):
    """h_t = a_t h_(t-1) + k_t v_t^T with a decay that depends on the data; the state is one matrix per head."""

    def __init__(self, args, layer):
        super().__init__()
        self.args, self.layer = args, layer
        self.qkv_proj = nn.Linear(args.dim, 3 * args.n_heads * args.head_dim, bias=False)
        self.decay_proj = nn.Linear(args.dim, args.n_heads)
        self.norm = RMSNorm(args.head_dim)
        self.o_proj = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x, positions, state, doc_ids):
        q, k, v = self.qkv_proj(x).float().unflatten(-1, (3, self.args.n_heads, -1)).unbind(dim=2)  # (B, T, H, K)
        decay = self.decay(x)  # (B, T, H)
        if doc_ids is not None:  # a new document starts from nothing
            first = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0))
            decay = decay.masked_fill(first[..., None], 0.0)
        memory = None if state is None else state.layers[self.layer].get("memory")
        if memory is None:
            memory = x.new_zeros(len(x), self.args.n_heads, self.args.head_dim, self.args.head_dim).float()
        out = []
        for t in range(x.shape[1]):
            memory = self.carry(memory, t)
            memory = decay[:, t, :, None, None] * memory + k[:, t, :, :, None] * v[:, t, :, None, :]
            out.append((q[:, t, :, :, None] * memory).sum(dim=-2))
        if state is not None:
            state.layers[self.layer]["memory"] = memory
        return self.o_proj(self.norm(torch.stack(out, dim=1)).flatten(-2).to(x.dtype))

    def decay(self, x):
        return (self.decay_proj(x).float() + 2).sigmoid()

    def carry(self, memory, t):
        return memory


@unusual
class Recurrent(WithoutAttention):
    Attention = GatedRecurrence


@unusual
class Hybrid(RightModel):
    """Recurrent layers with one of attention among them; flops left to the default estimate."""

    def make_layers(self):
        layers = super().make_layers()
        layers[0].attn = GatedRecurrence(self.args, 0)
        return layers


@unusual
class ChunkedLoss(RightModel):
    """Logits None with targets, the loss by the shared chunked function; capped at max_seq_len by no table at all."""

    def check_length(self, input_ids):
        pass

    def head(self, x, state):
        return self.norm(x[:, -1:] if state is not None and state.last_only else x)

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        hidden, _, other_vars = super().forward(input_ids, None, state, doc_ids)
        if targets is None:
            return self.lm_head(hidden), None, other_vars
        loss = lm_loss(hidden, self.lm_head.weight, targets)
        return None, loss, {"loss/ce": loss}


class ChunkedRecurrence(GatedRecurrence):
    """The same in chunks of 64 tokens, all tokens of one at once; decoding and packed documents go token by token."""

    def forward(self, x, positions, state, doc_ids):
        if state is not None or doc_ids is not None:
            return super().forward(x, positions, state, doc_ids)
        q, k, v = self.qkv_proj(x).float().unflatten(-1, (3, self.args.n_heads, -1)).unbind(dim=2)  # (B, T, H, K)
        log_decay = -F.softplus(-self.decay_proj(x).float() - 2)  # of what is `decay` above
        memory = x.new_zeros(len(x), self.args.n_heads, self.args.head_dim, self.args.head_dim).float()
        out = []
        for start in range(0, x.shape[1], 64):
            rows = slice(start, start + 64)
            with torch.autocast(x.device.type, enabled=False):
                mixed, memory = self.chunk(q[:, rows], k[:, rows], v[:, rows], log_decay[:, rows], memory)
            out.append(mixed)
        return self.o_proj(self.norm(torch.cat(out, dim=1)).flatten(-2).to(x.dtype))

    def chunk(self, q, k, v, log_decay, memory):
        total = log_decay.cumsum(dim=1)  # (B, C, H)
        causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()[..., None]
        left = (total[:, :, None] - total[:, None]).masked_fill(~causal, float("-inf")).exp()  # (B, C, C, H)
        out = torch.einsum("bthk,bshk,btsh,bshv->bthv", q, k, left, v)
        out = out + torch.einsum("bthk,bth,bhkv->bthv", q, total.exp(), memory)
        end = total[:, -1:]
        new = torch.einsum("bshk,bsh,bshv->bhkv", k, (end - total).exp(), v)
        return out, end.exp()[:, 0, :, None, None] * memory + new


@unusual
class Chunked(RightModel):
    Attention = ChunkedRecurrence


@unusual
class SmallGradients(RightModel):
    """A scale that starts at 1e-6 (CaiT), gates that start closed, a key bias that rotates (Qwen2), normed queries."""

    class Attention(Attention):
        def __init__(self, args, layer):
            super().__init__(args, layer)
            self.k_proj = nn.Linear(args.dim, args.n_kv_heads * args.head_dim)

        def turn(self, x, positions):
            return super().turn(F.rms_norm(x, (self.args.head_dim,)), positions)

    class Block(Block):
        def __init__(self, model, args, layer):
            super().__init__(model, args, layer)
            self.scale = nn.Parameter(torch.full((args.dim,), 1e-6))
            self.gate = nn.Linear(args.dim, 1)

        def forward(self, x, positions, state, doc_ids):
            x = x + self.scale * self.attn(self.attn_norm(x), positions, state, doc_ids)
            h = self.ffn_norm(x)
            return (x + self.ffn(h) * self.gate(h).sigmoid(),)

    def init_weights(self):
        super().init_weights()
        for layer in self.layers:
            nn.init.constant_(layer.gate.bias, -12.0)


@unusual
class Tables(RightModel):
    """Tables of which tiny sizes reach a part: padded to 64s, of hashed pairs, of the logarithm of distances."""

    PAIRS, NEAR, FAR, BUCKETS = 4099, 8, 128, 16

    class Attention(Attention):
        def __init__(self, args, layer):
            super().__init__(args, layer)
            self.distances = nn.Embedding(Tables.BUCKETS, args.n_heads)

        def weights(self, scores):
            t = torch.arange(scores.shape[-1], device=scores.device)
            distance = (t[:, None] - t).clamp(min=0)
            steps = (distance.clamp(min=1) / Tables.NEAR).log() / torch.tensor(Tables.FAR / Tables.NEAR).log()
            far = Tables.NEAR + (steps * (Tables.BUCKETS - Tables.NEAR)).long()
            bucket = torch.where(distance < Tables.NEAR, distance, far.clamp(max=Tables.BUCKETS - 1))
            return super().weights(scores + self.distances(bucket).permute(2, 0, 1))

    def make_more(self):
        padded = -(-self.args.vocab_size // 64) * 64
        self.tok_embed = nn.Embedding(padded, self.args.dim)
        self.lm_head = nn.Linear(self.args.dim, padded, bias=False)
        self.pairs = nn.Embedding(self.PAIRS, self.args.dim)

    def forward(self, input_ids, targets=None, doc_ids=None):
        return super().forward(input_ids, targets, None, doc_ids)

    def embed(self, input_ids, positions, targets, doc_ids):
        before = F.pad(input_ids[:, :-1], (1, 0))
        if doc_ids is not None:
            before = before * F.pad(doc_ids[:, 1:] == doc_ids[:, :-1], (1, 0))
        return self.tok_embed(input_ids) + self.pairs((before * 7919 + input_ids * 104729) % self.PAIRS)

    def head(self, x, state):
        return super().head(x, state)[..., : self.args.vocab_size]


@unusual
class RecomputesAndFreezes(RightModel):
    """Dropout in a recomputed feed-forward, a frozen map that stays in eval mode, gradients off for a moment."""

    class FFN(FeedForward):
        def forward(self, x):
            return checkpoint(self.drop, x, use_reentrant=False) if self.training else super().forward(x)

        def drop(self, x):
            return F.dropout(super().forward(x), 0.1)

    def make_more(self):
        self.frozen = nn.Sequential(nn.Linear(self.args.dim, self.args.dim, bias=False), nn.Dropout(0.5))
        self.frozen.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def head(self, x, state):
        with torch.no_grad():
            share = torch.full((), 0.1)
        return super().head(x + share * self.frozen(x), state)
