"""Right layers of newer kinds by hand, in pieces that a mutant can replace.

Windows with sinks, rings, convolutions, memories in chunks, compressed entries with an indexer, n-grams, experts by a
table, residual streams. What they keep in a state they keep in other ways than the layers that ship.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.layers import RMSNorm, token_positions

from .right import Attention, Block, MoE, MoEModel, RightModel, RightModelArgs, WithoutAttention, with_defaults

NONE = -1  # the id before the first token of a document


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


class Ngrams(RightModel):
    """A table of hashed triples of ids is added to the embedding; the state keeps the last two ids of each sequence."""

    rows = 61

    def make_more(self):
        self.triples = nn.Embedding(self.rows, self.args.dim)

    def add_more(self, x, input_ids, state, doc_ids):
        before = input_ids.new_full((len(input_ids), 2), NONE)
        if state is not None:
            before = self.last_ids(state, before)
        ids = torch.cat((before, input_ids), dim=1)
        if state is not None:
            self.keep(state, ids)
        one, two = self.earlier(ids)
        if doc_ids is not None:
            docs = F.pad(doc_ids, (2, 0), value=-2)
            one, two = self.within(one, two, docs[:, 1:-1] == doc_ids, docs[:, :-2] == doc_ids)
        return x + self.triples(self.hash(input_ids, one, two))

    def last_ids(self, state, empty):
        return state.model.get("ids", empty)

    def keep(self, state, ids):
        state.model["ids"] = ids[:, -2:].clone()
        state.empty["ids"] = NONE

    def earlier(self, ids):
        return ids[:, 1:-1], ids[:, :-2]

    def within(self, one, two, near, far):
        return one.where(near, NONE), two.where(far, NONE)

    def hash(self, ids, one, two):
        return (ids * 31 + (one + 1) * 7919 + (two + 1) * 104729) % self.rows


class HashMoE(MoE):
    """Experts by a table of ids, which are given as the token's chosen experts; the router weighs them."""

    def make_bias(self):
        pass

    def forward(self, x, chosen, doc_ids):
        tokens = x.flatten(0, 1)
        scores, chosen = self.score(tokens), chosen.flatten(0, 1)
        weights = self.weigh(scores, chosen)
        out = torch.zeros_like(tokens)
        for expert in range(self.args.n_routed_experts):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            h = self.expert(tokens[token], expert)
            out = out.index_add(0, token, (h * weights[token, slot, None]).to(out.dtype))
        return out.view_as(x), self.count(self.without_padding(chosen, doc_ids), scores)


class HashRouted(MoEModel):
    FFN = HashMoE

    class Block(Block):
        def forward(self, x, positions, state, doc_ids, chosen):
            x = x + self.attn(self.attn_norm(x), positions, state, doc_ids)
            out, load = self.ffn(self.ffn_norm(x), chosen, doc_ids)
            return x + out, load

    def make_more(self):
        generator = torch.Generator().manual_seed(1)
        draws = torch.rand(self.args.vocab_size, self.args.n_routed_experts, generator=generator)
        self.register_buffer("table", self.table_of(draws.topk(self.args.n_activated_experts).indices))  # (V, A)

    def table_of(self, choice):
        return choice

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        self.check_length(input_ids)
        positions, loads = token_positions(input_ids, state), []
        x, chosen = self.tok_embed(input_ids), self.table[self.key(input_ids, positions)]
        for layer in self.layers:
            x, load = layer(x, positions, state, doc_ids, chosen)
            loads.append(load)
        logits, other_vars = self.head(x, state), {"moe/load": torch.stack(loads).detach()}
        if targets is None:
            return logits, None, other_vars
        return logits, *self.losses(logits, targets, [], other_vars)

    def key(self, input_ids, positions):
        return input_ids

    def after_step(self, other_vars):
        pass


class StreamBlock(Block):
    """Reads a weighted sum of the streams, writes to all, mixes them by doubly stochastic matrices of the token."""

    def __init__(self, model, args, layer):
        super().__init__(model, args, layer)
        self.n, self.n_iters = model.n_streams, args.hc_iters
        self.map_norm = RMSNorm(self.n * args.dim)
        self.map_proj = nn.Linear(self.n * args.dim, 2 * self.n + self.n**2)
        self.scale = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, x, positions, state, doc_ids):  # (B, T, n, D)
        read, write, mix = self.maps(x)
        h = self.attn_norm((read[..., None] * x).sum(dim=2))
        h = h + self.attn(h, positions, state, doc_ids)
        h = self.ffn(self.ffn_norm(h))
        return (torch.einsum("btij,btjd->btid", mix, x) + write[..., None] * h[:, :, None],)

    def maps(self, x):
        z = self.scale * self.map_proj(self.normed(x.flatten(2)))
        read, write, mix = z.split((self.n, self.n, self.n**2), dim=-1)
        home = 3 * torch.eye(self.n, device=x.device)
        mix = mix.unflatten(-1, (self.n, self.n)).float() + home
        return self.gate(read).sigmoid(), 2 * self.gate(write).sigmoid(), self.sinkhorn(mix.exp()).to(x.dtype)

    def normed(self, x):
        return self.map_norm(x)

    def gate(self, z):
        return z

    def sinkhorn(self, m):
        for _ in range(self.n_iters):
            for axis in self.axes():
                m = m / m.sum(dim=axis, keepdim=True)
        return m

    def axes(self):
        return -1, -2


class Streams(RightModel):
    """Hyper-connections: the residual stream is three, read and written by maps that the token makes."""

    Args, Block, n_streams = with_defaults(RightModelArgs, hc_iters=8), StreamBlock, 3

    def add_more(self, x, input_ids, state, doc_ids):
        return torch.stack((x, x.flip(-1), x.roll(5, -1)), dim=2)  # unlike, so that the first layer's maps matter

    def head(self, x, state):
        shares = x.new_tensor((1.0, 0.5, -0.5))  # mixing keeps the plain sum: it would hide the last layer's maps
        return super().head((shares[:, None] * x).sum(dim=2), state)


class GatedAttention(Attention):
    """The output of each head times a gate of the token's own input."""

    def __init__(self, args, layer):
        super().__init__(args, layer)
        self.gate_proj = nn.Linear(args.dim, args.n_heads, bias=False)

    def forward(self, x, positions, state, doc_ids):
        q, k, v = (proj(x).unflatten(-1, (-1, self.args.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.turn(self.scaled(q), positions), self.turn(k, positions)
        if state is not None:
            k, v = self.remember(state, k, v, positions)
        out = self.mix(q, k, v, self.visible(positions, k.shape[1], state, doc_ids))
        return self.o_proj((self.gate(self.gate_proj(x)).sigmoid()[..., None] * out).flatten(-2))

    def scaled(self, q):
        return q

    def gate(self, z):  # (B, T, H)
        return z


class Gated(RightModel):
    Attention = GatedAttention


class Drafts(RightModel):
    """A second block predicts the token after the next, and drafts."""

    def make_more(self):
        self.further = Block(self, self.args, 0)
        self.merge = nn.Linear(2 * self.args.dim, self.args.dim, bias=False)

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        hidden, _, other_vars = super().forward(input_ids, None, state, doc_ids)
        if state is not None:
            state.hidden = hidden
            hidden = hidden[:, -1:] if state.last_only else hidden
        logits = self.lm_head(hidden)
        if targets is None:
            return logits, None, other_vars
        positions = torch.arange(input_ids.shape[1] - 1, device=input_ids.device)[None]
        docs = None if doc_ids is None else doc_ids[:, :-1]
        further = self.predict(hidden[:, :-1], input_ids[:, 1:], positions, None, docs)
        target = targets[:, 1:] if docs is None else targets[:, 1:].masked_fill(docs != doc_ids[:, 1:], -100)
        ce, more = self.cross_entropy(logits, targets), 0.3 * self.cross_entropy(self.lm_head(further), target)
        return logits, ce + more, {"loss/ce": ce, "loss/further": more}

    def head(self, x, state):
        return self.norm(x)

    def predict(self, hidden, ids, positions, state, docs):
        return self.further(self.merge(torch.cat((hidden, self.tok_embed(ids)), dim=-1)), positions, state, docs)[0]

    def draft(self, hidden, ids, state):
        hidden = self.predict(hidden, ids, self.draft_positions(state, ids), state, None)
        return self.lm_head(hidden[:, -1:] if state.last_only else hidden), hidden

    def draft_positions(self, state, ids):
        return state.positions(ids.shape[1])
