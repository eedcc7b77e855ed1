"""N-grams, experts by a table, residual streams and gates that take what belongs to another token."""

import torch
import torch.nn.functional as F

from .right import MoE, MoEModel, mutant
from .right_routes import (
    NONE,
    Drafts,
    Gated,
    GatedAttention,
    HashMoE,
    HashRouted,
    Ngrams,
    StreamBlock,
    Streams,
)
from .wrong_attention import LATER
from .wrong_gradients import LEARNS
from .wrong_packing import PACKED
from .wrong_state import CHUNKS

EVEN = "parts.sinkhorn_mixes_streams_evenly"
ALONE, REORDERED = "batch.alone_equals_batch", "state.sequences_can_be_reordered"


# ------------------------------------------------------------------- n-grams


@mutant(PACKED)
class NgramReachesOverABorder(Ngrams):
    def within(self, one, two, near, far):
        return one, two


@mutant(PACKED, slow=True)
class SecondIdReachesOverABorder(Ngrams):
    """Only the id before is compared: at the second token of a document the third id is that of another."""

    def within(self, one, two, near, far):
        return one.where(near, NONE), two.where(near, NONE)


@mutant(LATER)
class NgramOfTheNextTokens(Ngrams):
    def earlier(self, ids):
        return ids[:, 1:-1], torch.cat((ids[:, 3:], ids[:, -1:]), dim=1)


@mutant(CHUNKS)
class LastIdsAreNotKept(Ngrams):
    def keep(self, state, ids):
        pass


@mutant(CHUNKS, slow=True)
class LastIdsOfTheChunkOnly(Ngrams):
    def keep(self, state, ids):
        super().keep(state, F.pad(ids[:, 2:], (2, 0), value=NONE))


@mutant(CHUNKS, slow=True)
class LastIdsOneLate(Ngrams):
    def keep(self, state, ids):
        super().keep(state, ids[:, :-1])


@mutant(REORDERED)
class NoIdIsTokenZero(Ngrams):
    """The state does not say that -1 means nothing, so a freed sequence begins after two tokens of id 0."""

    def keep(self, state, ids):
        state.model["ids"] = ids[:, -2:].clone()


@mutant(REORDERED, slow=True)
class LastIdsHaveTheBatchLast(Ngrams):
    def last_ids(self, state, empty):
        return state.model["ids"].T if "ids" in state.model else empty

    def keep(self, state, ids):
        state.model["ids"] = ids[:, -2:].T.clone()


@mutant("state.clone_is_independent")
class LastIdsAreNoEntryOfTheState(Ngrams):
    """An attribute of the state object, which is not cloned, selected or overwritten."""

    def last_ids(self, state, empty):
        return getattr(state, "ids", empty)

    def keep(self, state, ids):
        state.ids = ids[:, -2:].clone()


@mutant(REORDERED, slow=True)
class LastIdsOfTheBatchInOneRow(Ngrams):
    def last_ids(self, state, empty):
        return state.model["ids"][0] if "ids" in state.model else empty

    def keep(self, state, ids):
        state.model["ids"] = ids[None, :, -2:].clone()
        state.empty["ids"] = NONE


@mutant("state.rewound_tokens_leave_no_trace")
class LastIdsAreDeclaredRewindable(Ngrams):
    def keep(self, state, ids):
        super().keep(state, ids)
        state.rewindable.add("ids")


@mutant("state.memory_is_bounded")
class AllIdsAreKeptAgainAndAgain(Ngrams):
    def keep(self, state, ids):
        super().keep(state, ids)
        state.model["history"] = torch.cat((state.model.get("history", ids[:, :0]), ids), dim=1)


# ------------------------------------------------------------------- experts by a table, padding


@mutant(PACKED, slow=True)
class ExpertsByPosition(HashRouted):
    def key(self, input_ids, positions):
        return positions.expand_as(input_ids) % self.args.vocab_size


@mutant(CHUNKS, slow=True)
class ExpertsByTheIndexInTheChunk(HashRouted):
    def key(self, input_ids, positions):
        return torch.arange(input_ids.shape[1]).expand_as(input_ids)


@mutant(LATER, slow=True)
class ExpertsOfTheNextToken(HashRouted):
    def key(self, input_ids, positions):
        return input_ids.roll(-1, 1)


@mutant(CHUNKS, slow=True)
class ExpertsOfTheTokenBefore(HashRouted):
    def key(self, input_ids, positions):
        return F.pad(input_ids[:, :-1], (1, 0))


@mutant(LEARNS, slow=True)
class TableOfZeros(HashRouted):
    def table_of(self, choice):
        return torch.arange(choice.shape[1]).expand_as(choice).clone()


@mutant("moe.loads_leave_padding_out")
class TableCountsPadding(HashRouted):
    class FFN(HashMoE):
        def without_padding(self, chosen, doc_ids):
            return chosen


@mutant("persistence.saved_weights_restore_the_model")
class TableIsDrawnAndNotSaved(HashRouted):
    def make_more(self):
        draws = torch.rand(self.args.vocab_size, self.args.n_routed_experts)
        self.table = draws.topk(self.args.n_activated_experts).indices


@mutant("packing.padding_changes_no_loss")
class BalanceCountsPadding(MoEModel):
    class FFN(MoE):
        def of_balance(self, scores, chosen, doc_ids):
            return scores, chosen


@mutant(LATER, slow=True)
class ScoresOverTheSequence(MoEModel):
    """A softmax over the tokens for one over the experts."""

    class FFN(MoE):
        def score(self, tokens):
            return self.router(tokens).float().softmax(dim=0)


# ------------------------------------------------------------------- residual streams


@mutant(LATER, slow=True)
class SinkhornOverTime(Streams):
    class Block(StreamBlock):
        def axes(self):
            return 1, -1


@mutant(ALONE)
class SinkhornOverTheBatch(Streams):
    class Block(StreamBlock):
        def axes(self):
            return 0, -1


@mutant(EVEN)
class SinkhornOverRowsTwice(Streams):
    class Block(StreamBlock):
        def axes(self):
            return -1, -1


@mutant(EVEN, slow=True)
class SinkhornOverColumnsTwice(Streams):
    class Block(StreamBlock):
        def axes(self):
            return -2, -2


@mutant(EVEN, slow=True)
class SinkhornOverAllAtOnce(Streams):
    """Divided by the mean of all elements' sum: the matrix sums to n, its rows and columns do not to 1."""

    class Block(StreamBlock):
        def sinkhorn(self, m):
            return self.n * m / m.sum(dim=(-1, -2), keepdim=True)


@mutant(LATER, slow=True)
class MapsAreNormedOverTime(Streams):
    class Block(StreamBlock):
        def normed(self, x):
            return super().normed(x * (x.square().mean(dim=1, keepdim=True) + 1e-5).rsqrt())


@mutant(LATER, slow=True)
class WritesByTheMapsOfTheNextToken(Streams):
    class Block(StreamBlock):
        def gate(self, z):
            return z.roll(-1, 1)


@mutant(CHUNKS, slow=True)
class WritesByTheMapsOfTheTokenBefore(Streams):
    class Block(StreamBlock):
        def gate(self, z):
            return F.pad(z[:, :-1], (0, 0, 1, 0))


@mutant("gradients.norms_per_layer", slow=True)
class SinkhornIsLeftOut(Streams):
    """Rows and columns of exp(.) that sum to 22: the streams grow with every layer."""

    class Block(StreamBlock):
        def sinkhorn(self, m):
            return m


# ------------------------------------------------------------------- gates and scales


@mutant(LATER, slow=True)
class GateOfTheNextToken(Gated):
    class Attention(GatedAttention):
        def gate(self, z):
            return z.roll(-1, 1)


@mutant(CHUNKS, slow=True)
class GateOfTheTokenBefore(Gated):
    class Attention(GatedAttention):
        def gate(self, z):
            return F.pad(z[:, :-1], (0, 0, 1, 0))


@mutant(PACKED, slow=True)
class GateOfTheFirstTokenOfTheSequence(Gated):
    """The first token of the text, which the state keeps, gates all: that of another document."""

    class Attention(GatedAttention):
        def forward(self, x, positions, state, doc_ids):
            first = x[:, :1]
            if state is not None:
                first = state.layers[self.layer].setdefault("first", first.clone())
            gate = self.gate_proj(first).sigmoid().mean(dim=-1, keepdim=True)
            return super().forward(x, positions, state, doc_ids) * gate


@mutant(ALONE, slow=True)
class GateOfAnotherSequence(Gated):
    class Attention(GatedAttention):
        def gate(self, z):
            return z.flip(0)


@mutant(LATER, slow=True)
class GateMixesTokensAndHeads(Gated):
    """`view(B, H, T)` where a transpose was meant."""

    class Attention(GatedAttention):
        def gate(self, z):
            return z.reshape(z.shape[0], z.shape[2], z.shape[1]).mT


@mutant("causality.prefixes_agree")
class ScaleOfTheWrongDimension(Gated):
    """q.shape[1] is the number of tokens where heads come before tokens."""

    class Attention(GatedAttention):
        def scaled(self, q):
            return q * q.shape[-1] ** 0.5 * q.shape[1] ** -0.5


# ------------------------------------------------------------------- names that a module declares


@mutant("contract.declared_names_exist")
class LeavesAMisspeltGateUnquantized(Gated):
    class Attention(GatedAttention):
        not_quantized = ("gate_projection",)


@mutant("contract.declared_names_exist", slow=True)
class NamesItsGateByAString(Gated):
    class Attention(GatedAttention):
        not_quantized = "gate_proj"


# ------------------------------------------------------------------- drafts


@mutant("state.drafts_in_chunks_agree")
class DraftsCountEachChunkFromZero(Drafts):
    def draft_positions(self, state, ids):
        return state.positions(ids.shape[1]) - state.pos[:, None]


@mutant("state.drafts_in_chunks_agree", slow=True)
class DraftsFromTheLastHiddenVectorOnly(Drafts):
    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        out = super().forward(input_ids, targets, state, doc_ids)
        if state is not None:
            state.hidden = state.hidden[:, -1:]
        return out
