"""Decoding that drifts: offsets, dropped tokens, states that are not their own."""

from dataclasses import replace

import torch
from torch import nn

from .right import Attention, FeedForward, RightModel, WindowsAndTails, mutant

CHUNKS, ROWS = "state.chunks_equal_full_forward", "state.sequences_at_their_own_positions"


@mutant(CHUNKS)
class CountsEachChunkFromZero(RightModel):
    class Attention(Attention):
        def turn(self, x, positions):
            return super().turn(x, positions - positions[:, :1])


@mutant(CHUNKS)
class TurnsKeysAgainWhenRead(RightModel):
    class Attention(Attention):
        def remember(self, state, k, v, positions):
            k, v = super().remember(state, k, v, positions)
            return self.turn(k, torch.arange(k.shape[1])[None]), v


@mutant(CHUNKS)
class ForgetsTheLastTokenOfAChunk(RightModel):
    class Attention(Attention):
        def append(self, state, name, new, positions):
            out = super().append(state, name, new, positions)
            last = state.layers[self.layer][name]
            seen = out.clone()
            last[torch.arange(len(new)), positions[:, -1]] = 0
            return seen


@mutant(CHUNKS)
class MaskForgetsTheOffset(RightModel):
    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            local = positions if state is None else positions - positions[:, :1]
            return super().visible(local, n_keys, state, doc_ids)


@mutant(CHUNKS)
class ChunkIsNotCausal(RightModel):
    """Right token by token; within a chunk attention is not causal."""

    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            if state is not None and state.max_pos > 0:
                positions = positions[:, -1:].expand_as(positions)
            return super().visible(positions, n_keys, state, doc_ids)


@mutant(CHUNKS)
class KeepsItsCacheInBf16(RightModel):
    class Attention(Attention):
        def append(self, state, name, new, positions):
            return super().append(state, name, new.bfloat16().float(), positions)


@mutant(CHUNKS)
class CacheIsOneTokenShort(RightModel):
    class Attention(Attention):
        def append(self, state, name, new, positions):
            return super().append(state, name, new, positions.clamp(max=state.max_len - 2))


@mutant(CHUNKS)
class ConvolutionRestartsAtEachChunk(RightModel):
    class FFN(FeedForward):
        def __init__(self, args):
            super().__init__(args)
            self.before = nn.Parameter(torch.empty(args.dim, args.dim))

        def forward(self, x):
            past = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
            return super().forward(x + past @ self.before.T)


@mutant("state.long_sequences")
class WindowSlidesOneTooFar(RightModel):
    """A window of 100 tokens in training, of 99 in decoding."""

    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            width = 100 if state is None or state.max_pos == 0 else 99
            recent = torch.arange(n_keys) > positions[..., None] - width
            return super().visible(positions, n_keys, state, doc_ids) & recent


@mutant(ROWS)
class TakesThePositionOfSequenceZero(RightModel):
    class Attention(Attention):
        def turn(self, x, positions):
            return super().turn(x, positions[:1].expand_as(positions))


@mutant(ROWS)
class TakesTheLargestPosition(RightModel):
    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            return super().visible(positions.amax(dim=0, keepdim=True).expand_as(positions), n_keys, state, doc_ids)


@mutant(ROWS)
class ReadsLeftovers(RightModel):
    """Every slot that is not zero counts as a key: right until a slot is reused."""

    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            seen = super().visible(positions, n_keys, state, doc_ids)
            if state is None or state.max_pos == 0:
                return seen
            filled = state.layers[self.layer]["k"][:, :n_keys].abs().sum(dim=(2, 3)) > 0
            filled[:, -positions.shape[1] :] = seen[:, -1, -positions.shape[1] :]
            return torch.where(torch.arange(n_keys) < n_keys - positions.shape[1], filled[:, None], seen)


@mutant("state.forward_leaves_pos_alone")
class AdvancesItself(RightModel):
    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        out = super().forward(input_ids, targets, state, doc_ids)
        if state is not None:
            state.advance(input_ids.shape[1])
        return out


@mutant("state.forward_leaves_pos_alone")
class LastOnlyTakesTheFirst(RightModel):
    def head(self, x, state):
        if state is not None and state.last_only:
            return self.lm_head(self.norm(x[:, :1]))
        return super().head(x, state)


@mutant("state.clone_is_independent")
class AllStatesShareOneCache(RightModel):
    class Attention(Attention):
        def append(self, state, name, new, positions):
            caches = self.__dict__.setdefault("caches", {})
            if state.max_pos == 0 and name not in caches:
                caches[name] = new.new_zeros(16, state.max_len, *new.shape[2:])
            state.layers[self.layer][name] = caches[name][: len(new)]
            return super().append(state, name, new, positions)


@mutant("state.clone_is_independent")
class HidesItsStateElsewhere(RightModel):
    """The cache is an attribute of the state object, which `clone`, `select` and `overwrite` do not see."""

    class Attention(Attention):
        def append(self, state, name, new, positions):
            if not hasattr(state, "hidden"):
                state.hidden = [{} for _ in state.layers]
            old, state.layers = state.layers, state.hidden
            out = super().append(state, name, new, positions)
            state.layers = old
            return out


@mutant("state.sequences_can_be_reordered")
class BatchIsTheSecondDimension(RightModel):
    class Attention(Attention):
        def append(self, state, name, new, positions):
            layer = state.layers[self.layer]
            if name in layer:
                layer[name] = layer[name].transpose(0, 1)
            out = super().append(state, name, new, positions)
            layer[name] = layer[name].transpose(0, 1)
            return out


@mutant("state.memory_is_bounded")
class TakesRoomForMaxSeqLenAtEachStep(RightModel):
    class Attention(Attention):
        def append(self, state, name, new, positions):
            out = super().append(state, name, new, positions)
            history = state.layers[self.layer].get("history", new[:, :0])
            state.layers[self.layer]["history"] = torch.cat((history, out), dim=1)
            return out


class CarriesAMean(nn.Module):
    """Adds the mean of what came before; the carried sum is in the state."""

    def __init__(self, args, layer):
        super().__init__()
        self.layer, self.v_proj = layer, nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x, positions, state, doc_ids):
        v, seen = self.v_proj(x), positions[..., None] + 1
        if doc_ids is not None:
            same = (doc_ids[:, :, None] == doc_ids[:, None, :]).tril().to(v.dtype)
            return same @ v / same.sum(dim=-1, keepdim=True)
        total = v.cumsum(dim=1)
        if state is not None:
            memory = state.layers[self.layer]
            total = total + memory.get("sum", torch.zeros_like(total[:, :1]))
            memory["sum"] = self.keep(total)
        return total / seen

    def keep(self, total):
        return total[:, -1:].clone()


@mutant(CHUNKS)
class CarriesTheSumBeforeTheLastToken(RightModel):
    class Attention(CarriesAMean):
        def keep(self, total):
            return total[:, -2:-1].clone() if total.shape[1] > 1 else total.clone()


REWOUND = "state.rewound_tokens_leave_no_trace"


@mutant(REWOUND)
class DeclaresItsSumRewindable(RightModel):
    class Attention(CarriesAMean):
        def forward(self, x, positions, state, doc_ids):
            if state is not None:
                state.rewindable.add("sum")
            return super().forward(x, positions, state, doc_ids)


@mutant(REWOUND)
class RingHasNoRoomForATrial(WindowsAndTails):
    """A ring of as many slots as the window has: a token that is taken back has overwritten one that is visible."""

    class Attention(WindowsAndTails.Attention):
        def forward(self, x, positions, state, doc_ids):
            return super().forward(x, positions, None if state is None else replace(state, room=0), doc_ids)


@mutant(CHUNKS)
class RingIsReadInItsOrder(WindowsAndTails):
    """The keys of a ring taken for the last ones in order, once it is full."""

    class Attention(WindowsAndTails.Attention):
        def visible_keys(self, positions, state, doc_ids):
            mask = super().visible_keys(positions, state, doc_ids)
            return mask if state is None or state.max_pos < 16 else mask.flip(-1)


@mutant(ROWS)
class RingStandsWhereTheFirstSequenceStands(WindowsAndTails):
    class Attention(WindowsAndTails.Attention):
        def visible_keys(self, positions, state, doc_ids):
            return super().visible_keys(positions[:1].expand_as(positions), state, doc_ids)
