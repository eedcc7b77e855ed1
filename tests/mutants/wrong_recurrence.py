"""Recurrences whose chunks, steps, documents and sequences do not fit together."""

import torch
import torch.nn.functional as F

from .right import mutant
from .right_layers import Memory, MemoryInChunks
from .wrong_attention import LATER
from .wrong_packing import PACKED
from .wrong_state import CHUNKS, REWOUND

LONG_STATE, LONG_PACKED, LONG_LOSS = "state.long_sequences", "packing.long_sequences", "loss.long_sequences"
LARGE = "precision.large_weights_stay_finite"


# ------------------------------------------------------------------- a chunk and a step


class _DecaysTwice(MemoryInChunks):
    def hand_over(self, memory, parts):
        return parts[3][:, -1, :, None, None].exp() * memory


@mutant(CHUNKS)
class DecaysTwiceAtAChunkBorder(Memory):
    Attention = _DecaysTwice


@mutant(LONG_STATE)
class DecaysTwiceAtALongChunksBorder(Memory):
    """Chunks of 64: a tiny sequence has no border."""

    class Attention(_DecaysTwice):
        size = 64


@mutant(LONG_LOSS)
class DecaysTwiceInTrainingOnly(Memory):
    class Attention(MemoryInChunks):
        size = 64

        def hand_over(self, memory, parts):
            return parts[3][:, -1, :, None, None].exp() * memory if self.training else memory


@mutant(CHUNKS, slow=True)
class CarryMissesTheFirstDecay(Memory):
    """What is left of the memory at token t counts the decays before t only."""

    class Attention(MemoryInChunks):
        def reach(self, total, docs, before):
            return super().reach(F.pad(total[:, :-1], (0, 0, 1, 0)), docs, before)


@mutant(CHUNKS, slow=True)
class StepDecaysWhatItWrites(Memory):
    class Attention(MemoryInChunks):
        def step(self, q, k, v, g, memory):
            return super().step(q, g.exp()[..., None] * k, v, g, memory)


@mutant(CHUNKS, slow=True)
class StepReadsBeforeItWrites(Memory):
    class Attention(MemoryInChunks):
        def step(self, q, k, v, g, memory):
            out = (q[:, 0, :, :, None] * g[:, 0, :, None, None].exp() * memory).sum(dim=-2)[:, None]
            return out, super().step(q, k, v, g, memory)[1]


@mutant(CHUNKS, slow=True)
class StepTransposesItsMemory(Memory):
    class Attention(MemoryInChunks):
        def step(self, q, k, v, g, memory):
            out, memory = super().step(q, k, v, g, memory.mT)
            return out, memory.mT


@mutant(CHUNKS, slow=True)
class PadsItsLastChunk(Memory):
    """To a multiple of five tokens, whose decay fades the memory that is kept."""

    class Attention(MemoryInChunks):
        def run(self, q, k, v, g, memory, doc_ids):
            n_tokens, more = q.shape[1], -q.shape[1] % self.size
            if doc_ids is not None or n_tokens == 1:
                return super().run(q, k, v, g, memory, doc_ids)
            q, k, v = (F.pad(t, (0, 0, 0, 0, 0, more)) for t in (q, k, v))
            g = F.pad(g, (0, 0, 0, more), value=-0.3)
            out, memory = super().run(q, k, v, g, memory, doc_ids)
            return out[:, :n_tokens], memory


@mutant(CHUNKS, slow=True)
class StateIsThatBeforeTheLastChunk(Memory):
    class Attention(MemoryInChunks):
        def run(self, q, k, v, g, memory, doc_ids):
            out, after = super().run(q, k, v, g, memory, doc_ids)
            return out, after if q.shape[1] <= self.size else memory


@mutant(CHUNKS, slow=True)
class FullForwardClampsItsDecay(Memory):
    """The time step has a lower bound in chunks and none in steps."""

    class Attention(MemoryInChunks):
        def chunk(self, q, k, v, g, *rest):
            return super().chunk(q, k, v, g.clamp(max=-0.2), *rest)


@mutant(CHUNKS, slow=True)
class ChunkDoesNotReadTheMemory(Memory):
    class Attention(MemoryInChunks):
        def chunk(self, q, k, v, g, memory, docs, before):
            _, after = super().chunk(q, k, v, g, memory, docs, before)
            return super().chunk(q, k, v, g, torch.zeros_like(memory), docs, before)[0], after


# ------------------------------------------------------------------- documents


@mutant(PACKED)
class CarriesTheDocumentBefore(Memory):
    class Attention(MemoryInChunks):
        def reach(self, total, docs, before):
            return total.exp()


@mutant(PACKED, slow=True)
class EarlierDocumentsWriteToTheMemory(Memory):
    """Within a chunk documents are apart; what goes on to the next one is of all of them."""

    class Attention(MemoryInChunks):
        def written(self, total, docs):
            return (total[:, -1:] - total).exp()


@mutant(PACKED, slow=True)
class DocumentThatBeginsWithAChunkInherits(Memory):
    """The memory is of the document that the chunk begins with, by assumption."""

    class Attention(MemoryInChunks):
        def reach(self, total, docs, before):
            return super().reach(total, docs, docs[:, :1])


@mutant(LONG_PACKED)
class DocumentThatBeginsAt64Inherits(Memory):
    class Attention(DocumentThatBeginsWithAChunkInherits.Attention):
        size = 64


@mutant(PACKED, slow=True)
class DocumentsDecayButStay(Memory):
    """A new document fades the memory strongly instead of dropping it."""

    class Attention(MemoryInChunks):
        def reach(self, total, docs, before):
            return total.exp() * (docs == before)[..., None].float().clamp(min=0.02)


# ------------------------------------------------------------------- sequences, rewinding, precision


@mutant("state.sequences_can_be_reordered")
class MemoryIsTheMeanOfTheBatch(Memory):
    class Attention(MemoryInChunks):
        def keep(self, memory, x):
            return memory.mean(dim=0, keepdim=True).expand_as(memory).clone()


@mutant(REWOUND)
class MemoryIsDeclaredRewindable(Memory):
    class Attention(MemoryInChunks):
        def forward(self, x, positions, state, doc_ids):
            if state is not None:
                state.rewindable.add("memory")
            return super().forward(x, positions, state, doc_ids)


@mutant(CHUNKS, slow=True)
class MemoryIsRoundedToBf16(Memory):
    class Attention(MemoryInChunks):
        def keep(self, memory, x):
            return memory.bfloat16().float()


@mutant("precision.recurrent_state_is_fp32")
class MemoryInTheTypeOfTheProjections(Memory):
    """fp32 in fp32; under autocast bf16."""

    class Attention(MemoryInChunks):
        def keep(self, memory, x):
            return memory.to(self.o_proj(x).dtype)


@mutant(LARGE)
class FactorsItsDecays(Memory):
    """exp(total_t) exp(-total_s) for exp(total_t - total_s): the second factor overflows."""

    class Attention(MemoryInChunks):
        size = 16

        def log_decay(self, z):
            return -4 * F.softplus(z)

        def left(self, total, pairs):
            return total[:, :, None].exp() * (-total[:, None]).exp() * pairs


@mutant(LARGE, slow=True)
class MasksAfterTheExponential(Memory):
    """The values are right; where the mask is the gradient is 0 times infinity."""

    class Attention(MemoryInChunks):
        size = 16

        def log_decay(self, z):
            return -4 * F.softplus(z)

        def left(self, total, pairs):
            return (total[:, :, None] - total[:, None]).exp().masked_fill(~pairs, 0.0)


@mutant(LATER)
class NormOfTheOutputOverTime(Memory):
    class Attention(MemoryInChunks):
        def normed(self, out):
            return self.norm(out / out.square().mean(dim=(1, 3), keepdim=True).add(1e-5).sqrt())


@mutant(LATER, slow=True)
class KeysOfUnitLengthOverTime(Memory):
    """`F.normalize(k, dim=1)`: over the tokens, not over the channels."""

    class Attention(MemoryInChunks):
        def run(self, q, k, v, g, memory, doc_ids):
            return super().run(q, F.normalize(k, dim=1), v, g, memory, doc_ids)


@mutant("causality.prefixes_agree")
class ScalesByTheLengthOfTheChunk(Memory):
    class Attention(MemoryInChunks):
        def chunk(self, q, *rest):
            return super().chunk(q * q.shape[1] ** -0.5, *rest)

        def normed(self, out):
            return out


@mutant(LONG_STATE, slow=True)
class DecayIsSummedInBf16(Memory):
    """In chunks of 64; steps are right."""

    class Attention(MemoryInChunks):
        size = 64

        def chunk(self, q, k, v, g, *rest):
            total = g.bfloat16().cumsum(dim=1).float()
            return super().chunk(q, k, v, total.diff(dim=1, prepend=torch.zeros_like(total[:, :1])), *rest)
