"""Correct architectures of newer kinds, with windows, memories, entries and tails of their own; all checks pass."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model.layers import token_positions

from .right import Attention, RightModel, RightModelArgs, WithoutAttention, unusual, with_defaults
from .right_layers import Entries, Memory, MemoryInChunks, Near, NearAttention, Ring, ShortConvolutions
from .right_routes import Drafts, Gated, HashRouted, Ngrams, Streams

slowly = partial(unusual, slow=True)
unusual(Entries)
unusual(Memory)
for right in (Near, Ring, ShortConvolutions, Ngrams, HashRouted, Streams, Gated, Drafts):
    slowly(right)


@slowly
class Blocks(Near):
    """Attention within blocks of five tokens, counted in each document, and to all in every other layer (Llama 4)."""

    Args = RightModelArgs

    class Attention(NearAttention):
        def visible(self, positions, n_keys, state, doc_ids):
            seen, keys = Attention.visible(self, positions, n_keys, state, doc_ids), torch.arange(n_keys)[None]
            if self.layer:
                return seen
            if doc_ids is not None:
                starts = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0)) * keys
                positions = keys = keys - starts.cummax(dim=1).values
            return seen & (keys[:, None] // 5 == positions[..., None] // 5)


@slowly
class OneLayerHasAWindow(Near):
    """The second of three; sinks of another shape, a softmax by hand."""

    Args = with_defaults(RightModelArgs, window_size=7, n_layers=3)

    class Attention(NearAttention):
        def make_sinks(self, args):
            self.sink = nn.Parameter(torch.full((args.n_heads, 1, 1), -3.0))

        def weights(self, scores):
            scores = torch.cat((scores, self.sink.expand(*scores.shape[:-1], 1)), dim=-1)
            return _softmax(scores)

        def window(self, state):
            return self.args.window_size if self.layer == 1 else self.args.max_seq_len


def _softmax(scores):
    """Of all but the last column, which counts in the sum only."""
    part = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return part[..., :-1] / part.sum(dim=-1, keepdim=True)


@slowly
class LearnedKeys(RightModel):
    """Two learned keys and values before the first token of each document, in place of a sink; no positions."""

    class Attention(Attention):
        def turn(self, x, positions):
            return x

        def __init__(self, args, layer):
            super().__init__(args, layer)
            self.sink_k = nn.Parameter(torch.empty(2, args.n_kv_heads, args.head_dim))
            self.sink_v = nn.Parameter(torch.empty(2, args.n_kv_heads, args.head_dim))

        def mix(self, q, k, v, visible):
            k, v = (torch.cat((p.expand(len(q), -1, -1, -1), t), 1) for p, t in ((self.sink_k, k), (self.sink_v, v)))
            return super().mix(q, k, v, F.pad(visible, (2, 0), value=True))


@slowly
class OneCacheForAllLayers(RightModel):
    """Keys and values are made once, from the embeddings, and read by all layers (YOCO): they stand in state.model."""

    class Attention(Attention):
        def __init__(self, args, layer):
            super().__init__(args, layer)
            del self.k_proj, self.v_proj

        def forward(self, x, positions, state, shared):
            q = self.turn(self.q_proj(x).unflatten(-1, (-1, self.args.head_dim)), positions)
            return self.o_proj(self.mix(q, *shared).flatten(-2))

    def make_more(self):
        self.kv = Attention(self.args, 0)
        del self.kv.q_proj, self.kv.o_proj

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        self.check_length(input_ids)
        positions, x = token_positions(input_ids, state), self.tok_embed(input_ids)
        k, v = (proj(x).unflatten(-1, (-1, self.args.head_dim)) for proj in (self.kv.k_proj, self.kv.v_proj))
        k = self.kv.turn(k, positions)
        if state is not None:
            k, v = self.kv.remember(replace(state, layers=[state.model]), k, v, positions)
        seen = self.kv.visible(positions, k.shape[1], state, doc_ids)
        for layer in self.layers:
            x = layer(x, positions, state, (k, v, seen))[0]
        logits = self.head(x, state)
        return (logits, None, {}) if targets is None else (logits, *self.losses(logits, targets, [], {}))


@slowly
class TokenShift(WithoutAttention):
    """A mean of the token and the one before (RWKV); the state keeps one vector (B, D)."""

    class Attention(nn.Module):
        def __init__(self, args, layer):
            super().__init__()
            self.layer = layer
            self.share = nn.Parameter(torch.full((args.dim,), 0.5))
            self.o_proj = nn.Linear(args.dim, args.dim, bias=False)

        def forward(self, x, positions, state, doc_ids):
            last = torch.zeros_like(x[:, 0])
            if state is not None:
                last = state.layers[self.layer].get("last", last).to(x.dtype)
                state.layers[self.layer]["last"] = x[:, -1].clone()
            before = torch.cat((last[:, None], x[:, :-1]), dim=1)
            if doc_ids is not None:
                before = before * F.pad(doc_ids[:, 1:] == doc_ids[:, :-1], (1, 0))[..., None]
            return self.o_proj(torch.lerp(x, before, self.share.to(x.dtype)))


@slowly
class Largest(WithoutAttention):
    """The largest value of each channel so far; zero is a value, so the state says that -1e4 means nothing."""

    class Attention(nn.Module):
        def __init__(self, args, layer):
            super().__init__()
            self.layer = layer
            self.v_proj, self.o_proj = (nn.Linear(args.dim, args.dim, bias=False) for _ in range(2))

        def forward(self, x, positions, state, doc_ids):
            v = self.v_proj(x)
            if doc_ids is not None:
                same = (doc_ids[:, :, None] == doc_ids[:, None]).tril()[..., None]  # (B, T, S, 1)
                return self.o_proj(v[:, None].masked_fill(~same, -1e4).amax(dim=2))
            if state is not None:
                held = state.layers[self.layer]
                v = torch.cat((held.get("largest", torch.full_like(v[:, :1], -1e4)).to(v.dtype), v), dim=1)
                held["largest"], state.empty["largest"] = v.amax(dim=1, keepdim=True), -1e4
            return self.o_proj(v.cummax(dim=1).values[:, -x.shape[1] :])


@slowly
class DeltaRulePerChannel(WithoutAttention):
    """Kimi Delta Attention token by token: a decay per channel of the key, and writing that erases; in float64."""

    class Attention(MemoryInChunks):
        def __init__(self, args, layer):
            super().__init__(args, layer)
            self.decay_proj = nn.Linear(args.dim, args.n_heads * (args.head_dim + 1))

        def log_decay(self, z):
            return z.unflatten(-1, (self.args.n_heads, -1))

        def run(self, q, k, v, g, memory, doc_ids):
            decay, beta = -F.softplus(g[..., :-1] - 1), g[..., -1:].sigmoid()
            q, k, v, decay, memory = (t.double() for t in (q, k, v, decay, memory))
            k = k / (k.square().sum(dim=-1, keepdim=True) + 1e-2).sqrt()
            outs = []
            for t in range(q.shape[1]):
                if doc_ids is not None and t:
                    memory = memory * (doc_ids[:, t] == doc_ids[:, t - 1])[:, None, None, None]
                memory = decay[:, t, ..., None].exp() * memory
                u = beta[:, t] * (v[:, t] - (memory * k[:, t, ..., None]).sum(dim=-2))
                memory = memory + k[:, t, ..., None] * u[..., None, :]
                outs.append((memory * q[:, t, ..., None]).sum(dim=-2))
            return torch.stack(outs, dim=1).float(), memory.float()
