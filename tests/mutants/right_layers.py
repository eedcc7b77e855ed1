"""Right layers of newer kinds by hand, in pieces that a mutant can replace.

Windows with sinks, rings, convolutions, memories in chunks, compressed entries with an indexer. What they keep in a
state they keep in other ways than the layers that ship.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.layers import RMSNorm

from .right import Attention, Block, RightModel, RightModelArgs, WithoutAttention, with_defaults


class NearAttention(Attention):
    """A window, the token itself counted, and a sink per head; the state keeps all tokens."""

    def __init__(self, args, layer):
        super().__init__(args, layer)
        self.make_sinks(args)

    def make_sinks(self, args):
        self.sinks = nn.Parameter(torch.zeros(args.n_heads))

    def visible(self, positions, n_keys, state, doc_ids):
        near = torch.arange(n_keys, device=positions.device) > positions[..., None] - self.window(state)
        return near & super().visible(positions, n_keys, state, doc_ids)

    def window(self, state):
        return self.args.window_size

    def weights(self, scores):
        sinks = self.sinks.view(-1, 1, 1).expand(*scores.shape[:-1], 1)  # (B, H, T, 1)
        return self.without_sinks(torch.cat((scores, sinks), dim=-1).softmax(dim=-1))

    def without_sinks(self, weights):
        return weights[..., :-1]


class Near(RightModel):
    Args, Attention = with_defaults(RightModelArgs, window_size=5), NearAttention


class RingAttention(NearAttention):
    """The same, the state keeps the last tokens only: position p in slot p % C, read before it is overwritten."""

    def slots(self):
        return self.args.window_size

    def append(self, state, name, new, positions):
        held, size = state.layers[self.layer], self.slots()
        old = held.get(name, new.new_zeros(len(new), size, *new.shape[2:]))
        held[name] = ring = old.clone()
        for t in self.kept(new.shape[1], size):
            ring[torch.arange(len(new)), self.slot(positions[:, t], t) % size] = new[:, t]
        return torch.cat((old, new), dim=1)

    def kept(self, n_tokens, size):
        return range(max(0, n_tokens - size), n_tokens)

    def slot(self, position, t):
        return position

    def visible(self, positions, n_keys, state, doc_ids):
        if state is None:
            return super().visible(positions, n_keys, state, doc_ids)
        last, slots = positions[:, :1] - 1, torch.arange(self.slots(), device=positions.device)
        keys = torch.cat((last - (last - slots) % self.slots(), positions), dim=1)  # (B, C + T)
        age = positions[..., None] - keys[:, None]
        return (age >= 0) & (age < self.args.window_size) & (keys >= 0)[:, None]


class Ring(Near):
    Attention = RingAttention


class GatedConv(nn.Module):
    """c * conv(b * x) with three taps, the first one that of the token itself; the state keeps the last two inputs."""

    size = 3

    def __init__(self, args, layer):
        super().__init__()
        self.layer = layer
        self.in_proj = nn.Linear(args.dim, 3 * args.dim, bias=False)
        self.taps = nn.Parameter(torch.empty(self.size, args.dim))
        self.o_proj = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x, positions, state, doc_ids):
        b, c, x = self.in_proj(x).chunk(3, dim=-1)
        x = b * x  # (B, T, D)
        before = self.tail(x, state)
        inputs = torch.cat((before, x), dim=1)
        if state is not None:
            state.layers[self.layer]["tail"] = self.keep(inputs, self.size - 1)
        docs = None if doc_ids is None else F.pad(doc_ids, (self.size - 1, 0), value=-2)
        out = torch.zeros_like(x)
        for j in range(self.size):  # tokens back
            at = self.place(j)
            tap = inputs[:, at : at + x.shape[1]]
            if docs is not None:
                tap = tap * self.same(docs, doc_ids, at, j)[..., None]
            out = out + self.tap(j, x.shape[1]) * tap
        return self.o_proj(self.gate(c) * out)

    def tail(self, x, state):
        empty = x.new_zeros(len(x), self.size - 1, x.shape[-1])
        return empty if state is None else state.layers[self.layer].get("tail", empty)

    def keep(self, inputs, n):
        return inputs[:, -n:].clone()

    def place(self, j):
        return self.size - 1 - j

    def tap(self, j, n_tokens):
        return self.taps[j]

    def same(self, docs, doc_ids, at, j):
        return docs[:, at : at + doc_ids.shape[1]] == doc_ids

    def gate(self, c):
        return c.sigmoid()


class ShortConvolutions(WithoutAttention):
    Attention = GatedConv


class MemoryInChunks(nn.Module):
    """S_t = exp(g_t) S_(t-1) + k_t v_t^T, o_t = S_t^T q_t, five tokens at a time, one by a step; documents by masks."""

    size = 5

    def __init__(self, args, layer):
        super().__init__()
        self.args, self.layer = args, layer
        self.qkv_proj = nn.Linear(args.dim, 3 * args.n_heads * args.head_dim, bias=False)
        self.decay_proj = nn.Linear(args.dim, args.n_heads)
        self.norm = RMSNorm(args.head_dim)
        self.o_proj = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x, positions, state, doc_ids):
        n_heads, head_dim = self.args.n_heads, self.args.head_dim
        q, k, v = self.qkv_proj(x).float().unflatten(-1, (3, n_heads, -1)).unbind(dim=2)  # (B, T, H, K)
        g = self.log_decay(self.decay_proj(x).float())  # (B, T, H)
        memory = x.new_zeros(len(x), n_heads, head_dim, head_dim).float()
        if state is not None:
            memory = state.layers[self.layer].get("memory", memory).float()
        with torch.autocast(x.device.type, enabled=False):
            out, memory = self.run(q, k, v, g, memory, doc_ids)
        if state is not None:
            state.layers[self.layer]["memory"] = self.keep(memory, x)
        return self.o_proj(self.normed(out).flatten(-2).to(x.dtype))

    def log_decay(self, z):
        return -F.softplus(z - 1)

    def normed(self, out):
        return self.norm(out)

    def keep(self, memory, x):
        return memory

    def run(self, q, k, v, g, memory, doc_ids):
        if q.shape[1] == 1:
            return self.step(q, k, v, g, memory)
        outs, before = [], None
        for start in range(0, q.shape[1], self.size):
            parts = [t[:, start : start + self.size] for t in (q, k, v, g)]
            docs = parts[0].new_zeros(parts[0].shape[:2]) if doc_ids is None else doc_ids[:, start : start + self.size]
            before = docs[:, :1] if before is None else before
            out, memory = self.chunk(*parts, memory, docs, before)
            memory, before = self.hand_over(memory, parts), docs[:, -1:]
            outs.append(out)
        return torch.cat(outs, dim=1), memory

    def hand_over(self, memory, parts):
        return memory

    def step(self, q, k, v, g, memory):
        memory = g[:, 0, :, None, None].exp() * memory + k[:, 0, :, :, None] * v[:, 0, :, None]
        return (q[:, 0, :, :, None] * memory).sum(dim=-2)[:, None], memory

    def chunk(self, q, k, v, g, memory, docs, before):
        total = g.cumsum(dim=1)  # (B, C, H)
        reach = self.reach(total, docs, before)  # of the memory before the chunk
        left = self.left(total, (docs[:, :, None] == docs[:, None]).tril()[..., None])
        out = torch.einsum("bthk,bshk,btsh,bshv->bthv", q, k, left, v)
        out = out + torch.einsum("bthk,bth,bhkv->bthv", q, reach, memory)
        end = self.written(total, docs)
        new = torch.einsum("bshk,bsh,bshv->bhkv", k, end, v)
        return out, reach[:, -1, :, None, None] * memory + new

    def reach(self, total, docs, before):
        return total.exp() * (docs == before)[..., None]

    def left(self, total, pairs):
        return (total[:, :, None] - total[:, None]).masked_fill(~pairs, float("-inf")).exp()  # (B, C, C, H)

    def written(self, total, docs):
        return (total[:, -1:] - total).exp() * (docs == docs[:, -1:])[..., None]


class Memory(WithoutAttention):
    Attention = MemoryInChunks


class EntryAttention(NearAttention):
    """The last tokens and the best two entries in one softmax; an entry is a mean of three tokens of a document.

    The state keeps the entry of positions 3 s .. 3 s + 2 in slot s, and the last two inputs. An indexer chooses, and
    learns from the KL divergence to the attention on the chosen entries.
    """

    ratio, best, index_dim = 3, 2, 8

    def __init__(self, args, layer):
        super().__init__(args, layer)
        self.weight_proj = nn.Linear(args.dim, 1, bias=False)
        self.index_q = nn.Linear(args.dim, self.index_dim, bias=False)
        self.index_k = nn.Linear(args.dim, self.index_dim, bias=False)

    def forward(self, x, positions, state, doc_ids):
        q, k, v = (proj(x).unflatten(-1, (-1, self.args.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        plain, q, k = q, self.turn(q, positions), self.turn(k, positions)
        if state is not None:
            k, v = self.remember(state, k, v, positions)
        seen = self.visible(positions, k.shape[1], state, doc_ids)  # (1 | B, T, S)
        entries, complete = self.entries(x, positions, state, doc_ids)  # (B, N, D), (B, T, N)
        scores = self.index(x, entries)  # (B, T, N)
        chosen = self.choose(scores.detach(), complete)
        k_more, v_more = (p(entries).unflatten(-1, (-1, self.args.head_dim)) for p in (self.k_proj, self.v_proj))
        k, k_more, v = (
            t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, k_more, torch.cat((v, v_more), 1))
        )
        logits = [
            torch.einsum("bthk,bshk->bhts", *pair) for pair in ((q, k), (self.without_position(plain, q), k_more))
        ]
        logits = torch.cat(logits, dim=-1).float() * self.args.head_dim**-0.5
        mask = torch.cat((seen.expand(len(x), -1, -1), chosen), dim=-1)[:, None]
        weights = self.weights(logits.masked_fill(~mask, -1e9))
        out = torch.einsum("bhts,bshk->bthk", weights.to(v.dtype), v)
        target = self.target(weights[..., -chosen.shape[-1] :].sum(dim=1))
        return self.o_proj(out.flatten(-2)), self.index_loss(scores, chosen, target, doc_ids)

    def without_position(self, plain, turned):
        return plain  # entries are not turned either

    def entries(self, x, positions, state, doc_ids):
        """Return a mean of the last three inputs for each token, or in a state for each three; and which are seen."""
        n, t = self.ratio, torch.arange(x.shape[1], device=x.device)
        before = self.tail(x, state)
        inputs = torch.cat((before, x), dim=1)
        inputs = torch.stack([inputs[:, j : j + len(t)] for j in range(n)], dim=2)  # (B, T, 3, D)
        means = (self.weight_proj(inputs).float().softmax(dim=2).to(x.dtype) * inputs).sum(dim=2)
        if state is None:
            place = self.place(positions, doc_ids)
            complete = (self.ends(place)[:, None] & self.reached(t, t)).expand(len(x), -1, -1)
            return means, complete if doc_ids is None else complete & self.same(doc_ids)
        held = state.layers[self.layer]
        held["tail"] = self.keep(torch.cat((before, x), dim=1))
        if "entries" not in held:
            held["entries"] = x.new_zeros(len(x), -(-state.max_len // n), x.shape[-1])
        self.write(held["entries"], means, positions)
        slots = torch.arange(held["entries"].shape[1], device=x.device)
        return held["entries"], self.slots_reached(slots, positions)

    def tail(self, x, state):
        empty = x.new_zeros(len(x), self.ratio - 1, x.shape[-1])
        return empty if state is None else state.layers[self.layer].get("tail", empty)

    def keep(self, inputs):
        return inputs[:, -(self.ratio - 1) :].clone()

    def place(self, positions, doc_ids):
        """Return the place of each token in its document (B | 1, T)."""
        if doc_ids is None:
            return positions
        starts = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0)) * positions
        return positions - starts.cummax(dim=1).values

    def ends(self, place):
        return place % self.ratio == self.ratio - 1

    def reached(self, query, last):
        return last <= query[:, None]  # (T, N)

    def same(self, doc_ids):
        return doc_ids[:, :, None] == doc_ids[:, None]

    def write(self, held, means, positions):
        sequence, t = self.ends(positions).nonzero(as_tuple=True)
        held[sequence, positions[sequence, t] // self.ratio] = means[sequence, t].to(held.dtype)

    def slots_reached(self, slots, positions):
        return (slots + 1) * self.ratio <= positions[..., None] + 1

    def index(self, x, entries):
        return self.index_q(x.detach()) @ self.index_k(entries.detach()).mT * self.index_dim**-0.5

    def choose(self, scores, complete):
        ranked = scores.masked_fill(~complete, float("-inf"))
        best = ranked.topk(min(self.best, scores.shape[-1])).indices
        return torch.zeros_like(complete).scatter(-1, best, True) & complete

    def target(self, weights):
        return weights.detach()

    def index_loss(self, scores, chosen, target, doc_ids):
        """KL(target || softmax of the scores) over the chosen entries, mean over the tokens."""
        target = target * chosen
        target = target / target.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        some = chosen.any(dim=-1, keepdim=True)
        log_p = scores.float().masked_fill(~chosen & some, float("-inf")).log_softmax(dim=-1).masked_fill(~chosen, 0.0)
        kl = (torch.special.xlogy(target, target) - target * log_p).sum(dim=-1)  # (B, T)
        return self.mean(kl, doc_ids)

    def mean(self, kl, doc_ids):
        if doc_ids is None:
            return kl.mean()
        return (kl * (doc_ids >= 0)).sum() / (doc_ids >= 0).sum().clamp(min=1)


class Entries(RightModel):
    Args, Attention = with_defaults(RightModelArgs, window_size=4), EntryAttention

    class Block(Block):
        def forward(self, x, positions, state, doc_ids):
            out, kl = self.attn(self.attn_norm(x), positions, state, doc_ids)
            x = x + out
            return x + self.ffn(self.ffn_norm(x)), None, kl

    def losses(self, logits, targets, balances, other_vars):
        return super().losses(logits, targets, [], self.index_terms(torch.stack(balances).sum()))

    def index_terms(self, kl):
        return {"loss/index": kl}
