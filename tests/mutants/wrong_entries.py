"""Compressed entries seen too early or by others, indexers that look ahead, index losses that teach the wrong part."""

import torch

from .right import mutant
from .right_layers import Entries, EntryAttention
from .wrong_attention import LATER
from .wrong_gradients import LEARNS
from .wrong_packing import PACKED
from .wrong_state import CHUNKS, REWOUND, ROWS

INDEX = "parts.index_loss_teaches_the_indexer_alone"


# ------------------------------------------------------------------- which entries are seen


@mutant(LATER)
class EntryIsSeenBeforeItsWindowIsComplete(Entries):
    class Attention(EntryAttention):
        def reached(self, query, last):
            return last <= query[:, None] + 1


@mutant(CHUNKS)
class EntryIsSeenOneTokenLate(Entries):
    """In training only from the token after its last one, in a state from the last one on."""

    class Attention(EntryAttention):
        def reached(self, query, last):
            return last < query[:, None]


@mutant(CHUNKS, slow=True)
class SlotIsSeenBeforeItIsComplete(Entries):
    class Attention(EntryAttention):
        def slots_reached(self, slots, positions):
            return slots * self.ratio <= positions[..., None]


@mutant(CHUNKS, slow=True)
class LastSlotIsNotSeen(Entries):
    class Attention(EntryAttention):
        def slots_reached(self, slots, positions):
            return (slots + 1) * self.ratio < positions[..., None] + 1


@mutant(ROWS)
class SlotsOfTheFirstSequenceAreSeen(Entries):
    class Attention(EntryAttention):
        def slots_reached(self, slots, positions):
            return super().slots_reached(slots, positions[:1].expand_as(positions))


@mutant(ROWS, slow=True)
class EntriesEndWhereThoseOfTheFirstSequenceDo(Entries):
    class Attention(EntryAttention):
        def write(self, held, means, positions):
            sequence, t = self.ends(positions[:1].expand_as(positions)).nonzero(as_tuple=True)
            held[sequence, positions[sequence, t] // self.ratio] = means[sequence, t]


@mutant(ROWS, slow=True)
class EntriesGoToTheSlotOfTheFirstSequence(Entries):
    class Attention(EntryAttention):
        def write(self, held, means, positions):
            sequence, t = self.ends(positions).nonzero(as_tuple=True)
            held[sequence, positions[0, t] // self.ratio] = means[sequence, t]


@mutant(ROWS, slow=True)
class EntriesOfAnotherSequence(Entries):
    """The sequences that complete a window are counted off: right when all of them do."""

    class Attention(EntryAttention):
        def write(self, held, means, positions):
            sequence, t = self.ends(positions).nonzero(as_tuple=True)
            count = sequence.unique(return_inverse=True)[1]
            held[sequence, positions[sequence, t] // self.ratio] = means[count, t]


@mutant(CHUNKS, slow=True)
class LastWindowOfAChunkOnly(Entries):
    """A chunk that completes two windows keeps the second."""

    class Attention(EntryAttention):
        def write(self, held, means, positions):
            last = positions >= positions[:, -1:] - self.ratio + 1
            sequence, t = (self.ends(positions) & last).nonzero(as_tuple=True)
            held[sequence, positions[sequence, t] // self.ratio] = means[sequence, t]


@mutant(CHUNKS, slow=True)
class InputsOfAWindowAreOneShort(Entries):
    class Attention(EntryAttention):
        def keep(self, inputs):
            return torch.cat((torch.zeros_like(inputs[:, :1]), inputs[:, -1:]), dim=1)


@mutant(REWOUND)
class InputsOfAWindowAreDeclaredRewindable(Entries):
    class Attention(EntryAttention):
        def entries(self, x, positions, state, doc_ids):
            if state is not None:
                state.rewindable.update(("entries", "tail"))
            return super().entries(x, positions, state, doc_ids)


# ------------------------------------------------------------------- documents


@mutant(PACKED)
class EntriesOfTheDocumentBefore(Entries):
    class Attention(EntryAttention):
        def same(self, doc_ids):
            return torch.ones_like(doc_ids[:, :, None] == doc_ids[:, None])


@mutant(PACKED, slow=True)
class WindowsCountFromTheStartOfTheSequence(Entries):
    class Attention(EntryAttention):
        def place(self, positions, doc_ids):
            return positions


@mutant(PACKED, slow=True)
class WindowsBeginAtTheDocumentsOfSequenceZero(Entries):
    class Attention(EntryAttention):
        def place(self, positions, doc_ids):
            return super().place(positions, None if doc_ids is None else doc_ids[:1])


@mutant(PACKED, slow=True)
class QueriesOfEntriesAreTurned(Entries):
    """Entries are not, so a score depends on where the query stands in the sequence."""

    class Attention(EntryAttention):
        def without_position(self, plain, turned):
            return turned


@mutant(PACKED, slow=True)
class IndexerChoosesAmongAllDocuments(Entries):
    """What it chooses of others is masked then, and has taken the place of an own entry."""

    class Attention(EntryAttention):
        def choose(self, scores, complete):
            if complete.shape[1] != complete.shape[2]:  # with a state
                return super().choose(scores, complete)
            seen = complete.any(dim=1, keepdim=True) & torch.ones_like(complete).tril()
            best = scores.masked_fill(~seen, float("-inf")).topk(min(self.best, scores.shape[-1])).indices
            return torch.zeros_like(complete).scatter(-1, best, True) & complete


# ------------------------------------------------------------------- the indexer


@mutant(LATER, slow=True)
class IndexerHasNoCausalLimit(Entries):
    """The best entries of all, later ones among them, which are masked after the choice."""

    class Attention(EntryAttention):
        def choose(self, scores, complete):
            possible = complete.any(dim=1, keepdim=True).expand_as(complete)
            best = scores.masked_fill(~possible, float("-inf")).topk(min(self.best, scores.shape[-1])).indices
            return torch.zeros_like(complete).scatter(-1, best, True) & complete


@mutant(LATER, slow=True)
class IndexerIsTheOnlyLimit(Entries):
    """Where fewer entries than two are complete, the two best are later ones, and are seen."""

    class Attention(EntryAttention):
        def choose(self, scores, complete):
            ranked = scores - 1e3 * ~complete
            best = ranked.topk(min(self.best, scores.shape[-1])).indices
            return torch.zeros_like(complete).scatter(-1, best, True)


@mutant(LATER, slow=True)
class ScoresAreCentredOverTime(Entries):
    """Scores minus their mean over the tokens decide, and the mean knows the later ones."""

    class Attention(EntryAttention):
        def choose(self, scores, complete):
            return super().choose(scores - scores.mean(dim=1, keepdim=True), complete)


@mutant(INDEX)
class TargetIsNotDetached(Entries):
    class Attention(EntryAttention):
        def target(self, weights):
            return weights


@mutant(INDEX, slow=True)
class IndexerReadsTheStreamWithItsGraph(Entries):
    class Attention(EntryAttention):
        def index(self, x, entries):
            return self.index_q(x) @ self.index_k(entries.detach()).mT * self.index_dim**-0.5


@mutant(INDEX, slow=True)
class IndexerReadsTheEntriesWithTheirGraph(Entries):
    class Attention(EntryAttention):
        def index(self, x, entries):
            return self.index_q(x.detach()) @ self.index_k(entries).mT * self.index_dim**-0.5


@mutant(INDEX, slow=True)
class IndexerKeysAreKeysOfTheModel(Entries):
    """One matrix for both: the index loss moves what attention reads."""

    class Attention(EntryAttention):
        def entries(self, x, positions, state, doc_ids):
            means, complete = super().entries(x, positions, state, doc_ids)
            return means + 0.1 * self.index_k(means).sum(dim=-1, keepdim=True), complete


@mutant(LEARNS, slow=True)
class IndexLossIsMissing(Entries):
    def index_terms(self, kl):
        return {}


@mutant(LEARNS, slow=True)
class IndexLossHasNoWeight(Entries):
    def index_terms(self, kl):
        return {"loss/index": 0.0 * kl}


@mutant("contract.loss_is_sum_of_terms")
class IndexLossIsReportedDetached(Entries):
    def index_terms(self, kl):
        return {"loss/index": kl.detach()}


@mutant("packing.padding_changes_no_loss")
class IndexLossCountsPadding(Entries):
    class Attention(EntryAttention):
        def mean(self, kl, doc_ids):
            return kl.mean()


@mutant(LEARNS, slow=True)
class ScoresAreDetached(Entries):
    class Attention(EntryAttention):
        def index_loss(self, scores, chosen, target, doc_ids):
            return super().index_loss(scores.detach(), chosen, target, doc_ids)
