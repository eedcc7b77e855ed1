"""Windows, sinks, rings and convolutions that see or keep one token too many, too few, or another one."""

import torch
import torch.nn.functional as F
from torch import nn

from model.layers import CausalConv

from .right import WindowsAndTails, mutant
from .right_layers import GatedConv, Near, NearAttention, Ring, RingAttention, ShortConvolutions
from .wrong_attention import LATER
from .wrong_packing import PACKED
from .wrong_state import CHUNKS, REWOUND, ROWS

WINDOW, SINK = "parts.windows_count_the_token_itself", "parts.sinks_only_take"


# ------------------------------------------------------------------- windows


@mutant(WINDOW)
class WindowIsOneTooLong(Near):
    class Attention(NearAttention):
        def window(self, state):
            return self.args.window_size + 1


@mutant(WINDOW, slow=True)
class WindowIsOneTooShort(Near):
    class Attention(NearAttention):
        def window(self, state):
            return self.args.window_size - 1


@mutant(CHUNKS)
class WindowIsOneTooLongWithAState(Near):
    class Attention(NearAttention):
        def window(self, state):
            return self.args.window_size + (state is not None)


@mutant(CHUNKS, slow=True)
class WindowIsOneTooShortWithAState(Near):
    class Attention(NearAttention):
        def window(self, state):
            return self.args.window_size - (state is not None and state.max_pos > 0)


@mutant(CHUNKS, slow=True)
class WindowOfTheLastTokenForTheChunk(Near):
    """Every token of a chunk sees the window of its last one: earlier ones lose their oldest keys."""

    class Attention(NearAttention):
        def visible(self, positions, n_keys, state, doc_ids):
            seen = super().visible(positions, n_keys, state, doc_ids)
            oldest = positions[:, -1:, None] - self.args.window_size
            return seen if state is None else seen & (torch.arange(n_keys) > oldest)


@mutant(PACKED)
class BlocksCountFromTheStartOfTheSequence(Near):
    """Attention within blocks of five tokens (Llama 4), which a packed document does not begin with."""

    class Attention(NearAttention):
        def visible(self, positions, n_keys, state, doc_ids):
            same = torch.arange(n_keys) // 5 == positions[..., None] // 5
            return same & super().visible(positions, n_keys, state, doc_ids)


@mutant(PACKED, slow=True)
class WindowForgetsTheDocuments(Near):
    """A mask that is either that of documents or that of the window."""

    class Attention(NearAttention):
        def visible(self, positions, n_keys, state, doc_ids):
            seen = super().visible(positions, n_keys, state, doc_ids)
            return seen if doc_ids is None else super().visible(positions, n_keys, state, None)


@mutant(LATER)
class WindowReachesAhead(Near):
    """`abs(age) < window` without the causal mask."""

    class Attention(NearAttention):
        def visible(self, positions, n_keys, state, doc_ids):
            return (positions[..., None] - torch.arange(n_keys)).abs() < self.args.window_size


# ------------------------------------------------------------------- sinks


@mutant(SINK)
class SinkIsAddedToAllScores(Near):
    """In the numerator as well: the softmax cancels it."""

    class Attention(NearAttention):
        def weights(self, scores):
            return (scores + self.sinks.view(-1, 1, 1)).softmax(dim=-1)


@mutant(SINK, slow=True)
class SinkGivesItsShareToTheTokenItself(Near):
    class Attention(NearAttention):
        def without_sinks(self, weights):
            n_tokens, n_keys = weights.shape[-2], weights.shape[-1] - 1
            itself = torch.eye(n_keys)[n_keys - n_tokens :]
            return weights[..., :-1] + weights[..., -1:] * itself


@mutant(LATER, slow=True)
class SinkGivesItsShareToAllKeys(Near):
    class Attention(NearAttention):
        def without_sinks(self, weights):
            return weights[..., :-1] + weights[..., -1:] / (weights.shape[-1] - 1)


@mutant(LATER, slow=True)
class DropsTheFirstColumnNotTheSink(Near):
    class Attention(NearAttention):
        def without_sinks(self, weights):
            return weights[..., 1:]


@mutant(SINK, slow=True)
class OneSinkForAllHeads(Near):
    class Attention(NearAttention):
        def make_sinks(self, args):
            self.sinks = nn.Parameter(torch.zeros(1))


@mutant(SINK, slow=True)
class SinkOfHeadZeroForAll(Near):
    class Attention(NearAttention):
        def weights(self, scores):
            sinks = self.sinks[:1].view(-1, 1, 1).expand(*scores.shape[:-1], 1) + 0 * self.sinks.view(-1, 1, 1)
            return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]


@mutant(CHUNKS, slow=True)
class SinkInTrainingOnly(Near):
    class Attention(NearAttention):
        def weights(self, scores):
            return super().weights(scores) if scores.shape[-1] == scores.shape[-2] else scores.softmax(dim=-1)


@mutant("gradients.every_parameter_learns", slow=True)
class SinkIsDetached(Near):
    class Attention(NearAttention):
        def weights(self, scores):
            sinks = self.sinks.detach().view(-1, 1, 1).expand(*scores.shape[:-1], 1)
            return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]


# ------------------------------------------------------------------- rings


@mutant(CHUNKS, slow=True)
class RingIsOneSlotShort(Ring):
    class Attention(RingAttention):
        def slots(self):
            return self.args.window_size - 2  # the new tokens come on top


@mutant(ROWS)
class RingWritesWhereTheFirstSequenceStands(Ring):
    class Attention(RingAttention):
        def slot(self, position, t):
            return position[:1].expand_as(position)


@mutant(CHUNKS, slow=True)
class RingBeginsAnewWithEachChunk(Ring):
    class Attention(RingAttention):
        def slot(self, position, t):
            return torch.full_like(position, t)


@mutant(CHUNKS, slow=True)
class RingKeepsTheFirstOfALongChunk(Ring):
    class Attention(RingAttention):
        def kept(self, n_tokens, size):
            return range(min(size, n_tokens))


@mutant(REWOUND)
class RingIsDeclaredRewindable(Ring):
    """It is not: it has no slot to spare, and a token that is taken back has overwritten one."""

    class Attention(RingAttention):
        def append(self, state, name, new, positions):
            state.rewindable.add(name)
            return super().append(state, name, new, positions)


@mutant(ROWS, slow=True)
class RingOf128OfTheFirstSequence(Ring):
    """Right up to 128 tokens: only long texts at different positions show it."""

    class Attention(RingAttention):
        def slots(self):
            return 128

        def slot(self, position, t):
            return torch.where(position < 128, position, position[:1])


@mutant(REWOUND, slow=True)
class TailIsOneShortForATrial(WindowsAndTails):
    """The shared tail with room for fewer tokens than can be taken back."""

    class Attention(WindowsAndTails.Attention):
        def __init__(self, args, layer):
            super().__init__(args, layer)
            self.conv = ShortTail(args.dim, 3)


class ShortTail(CausalConv):
    def forward(self, x, state=None, layer=None, name="conv", doc_ids=None):
        if state is not None:
            room, state.room = state.room, state.room - 2
        out = super().forward(x, state, layer, name, doc_ids)
        if state is not None:
            state.room = room
        return out


# ------------------------------------------------------------------- convolutions


@mutant(PACKED, slow=True)
class TapReachesIntoTheDocumentBefore(ShortConvolutions):
    class Attention(GatedConv):
        def same(self, docs, doc_ids, at, j):
            return super().same(docs, doc_ids, at, j) | (j == self.size - 1)


@mutant(PACKED, slow=True)
class TapLooksAtItsNeighboursDocument(ShortConvolutions):
    """Two tokens back counts when it is of the document of one token back."""

    class Attention(GatedConv):
        def same(self, docs, doc_ids, at, j):
            if j == 0:
                return super().same(docs, doc_ids, at, j)
            n_tokens = doc_ids.shape[1]
            return docs[:, at : at + n_tokens] == docs[:, at + 1 : at + 1 + n_tokens]


@mutant(LATER, slow=True)
class TapReachesIntoTheFuture(ShortConvolutions):
    class Attention(GatedConv):
        def forward(self, x, positions, state, doc_ids):
            ahead = F.pad(x[:, 1:], (0, 0, 0, 1))
            return super().forward(x, positions, state, doc_ids) + self.o_proj(self.taps[0] * ahead)


@mutant(CHUNKS, slow=True)
class TailIsOneShort(ShortConvolutions):
    class Attention(GatedConv):
        def keep(self, inputs, n):
            return torch.cat((torch.zeros_like(inputs[:, :1]), inputs[:, -n + 1 :]), dim=1)


@mutant(CHUNKS, slow=True)
class TailIsOneLate(ShortConvolutions):
    class Attention(GatedConv):
        def keep(self, inputs, n):
            return inputs[:, -n - 1 : -1].clone()


@mutant(CHUNKS, slow=True)
class TailIsThatOfTheChunk(ShortConvolutions):
    """What a chunk of one token does not hold is taken for zero."""

    class Attention(GatedConv):
        def keep(self, inputs, n):
            chunk = inputs[:, n:]
            return torch.cat((torch.zeros_like(inputs[:, :n]), chunk), dim=1)[:, -n:]


@mutant(CHUNKS, slow=True)
class TapsAreReversedInASingleStep(ShortConvolutions):
    class Attention(GatedConv):
        def tap(self, j, n_tokens):
            return self.taps[j if n_tokens > 1 else self.size - 1 - j]


@mutant("state.sequences_can_be_reordered")
class TailOfOneSequenceForAll(ShortConvolutions):
    class Attention(GatedConv):
        def keep(self, inputs, n):
            return inputs[:1, -n:].clone()
