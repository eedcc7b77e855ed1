"""More right layers by hand: n-grams, experts by a table, residual streams, gates, drafts."""

import torch
import torch.nn.functional as F
from torch import nn

from model.layers import RMSNorm, token_positions

from .right import Attention, Block, MoE, MoEModel, RightModel, RightModelArgs, with_defaults

NONE = -1  # the id before the first token of a document


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
