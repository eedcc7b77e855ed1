"""Masks, norms and convolutions that see later tokens, sequences that see each other."""

import torch
from torch import nn

from .right import Attention, Block, FeedForward, MoE, MoEModel, RightModel, mutant

LATER = "causality.later_tokens_change_nothing"


@mutant(LATER)
class MaskLooksOneAhead(RightModel):
    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            return super().visible(positions + 1, n_keys, state, doc_ids)


@mutant(LATER)
class NoMask(RightModel):
    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            return torch.ones_like(super().visible(positions, n_keys, state, doc_ids))


@mutant(LATER)
class OneHeadLooksAhead(RightModel):
    class Attention(Attention):
        def mix(self, q, k, v, visible):
            free = super().mix(q[:, :, :1], k[:, :, :1], v[:, :, :1], torch.ones_like(visible))
            return torch.cat((free, super().mix(q, k, v, visible)[:, :, 1:]), dim=2)


@mutant(LATER)
class SoftmaxOverQueries(RightModel):
    class Attention(Attention):
        def weights(self, scores):
            return scores.softmax(dim=-2)


@mutant(LATER)
class SoftmaxOverHeads(RightModel):
    class Attention(Attention):
        def weights(self, scores):
            return scores.softmax(dim=1)


@mutant(LATER)
class MaskAfterSoftmax(RightModel):
    """The weights of later tokens are zeroed, but they have taken part in the normaliser."""

    class Attention(Attention):
        def mix(self, q, k, v, visible):
            k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
            weights = torch.einsum("bthk,bshk->bhts", q, k).softmax(dim=-1)
            return torch.einsum("bhts,bshk->bthk", weights * visible[:, None], v)


@mutant("causality.long_sequences")
class MaskLeaksBeyond128(RightModel):
    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            return super().visible(positions + (positions >= 128), n_keys, state, doc_ids)


@mutant("causality.long_sequences")
class ChunksOf64AreNotCausal(RightModel):
    """Sequences longer than a chunk are worked on chunk by chunk, and the mask is that of chunks."""

    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            seen = super().visible(positions, n_keys, state, doc_ids)
            if n_keys <= 64:
                return seen
            chunk = torch.arange(n_keys) // 64
            return seen | (chunk == chunk[positions][..., None])


@mutant(LATER)
class ConvolutionOnBothSides(RightModel):
    class FFN(FeedForward):
        def __init__(self, args):
            super().__init__(args)
            self.conv = nn.Conv1d(args.inter_dim, args.inter_dim, 3, padding=1, groups=args.inter_dim)

        def forward(self, x):
            return self.down_proj(self.conv(self.up_proj(x).transpose(1, 2)).transpose(1, 2).sigmoid())


@mutant(LATER)
class NormOverTime(RightModel):
    class Block(Block):
        def forward(self, x, *rest):
            return super().forward(x / (x.square().mean(dim=1, keepdim=True) + 1e-5).sqrt(), *rest)


@mutant(LATER)
class SubtractsTheMeanOfTheSequence(RightModel):
    def head(self, x, state):
        return super().head(x - x.mean(dim=1, keepdim=True), state)


@mutant(LATER)
class ShiftsTheWrongWay(RightModel):
    """Half of the features come from the neighbour: the next one instead of the one before."""

    class FFN(FeedForward):
        def forward(self, x):
            half = x.shape[-1] // 2
            return super().forward(torch.cat((x[..., :half].roll(-1, 1), x[..., half:]), dim=-1))


@mutant(LATER)
class RollsAround(RightModel):
    """The neighbour before the first token is the last of the sequence."""

    class FFN(FeedForward):
        def forward(self, x):
            half = x.shape[-1] // 2
            return super().forward(torch.cat((x[..., :half].roll(1, 1), x[..., half:]), dim=-1))


@mutant(LATER)
class ExpertsChooseTokens(MoEModel):
    class FFN(MoE):
        def choose(self, scores):  # each expert takes its best tokens of the sequence; the others go to expert 0
            keep = torch.zeros_like(scores).scatter(0, scores.topk(max(1, len(scores) // 4), dim=0).indices, 1.0)
            return (scores + 10 * keep).topk(self.args.n_activated_experts, dim=-1).indices


@mutant("causality.gradient_reaches_the_past_only")
class SeesOnlyItself(RightModel):
    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            return torch.arange(n_keys) == positions[..., None]


@mutant("learning.recalls_the_past")
class ThrowsItsAttentionAway(RightModel):
    class Attention(Attention):
        def forward(self, *args):
            return 0 * super().forward(*args)


@mutant("causality.prefixes_agree")
class ScalesByTheLength(RightModel):
    class Attention(Attention):
        def mix(self, q, k, v, visible):
            return super().mix(q * (1 + 0.1 * q.shape[1]), k, v, visible)


@mutant("causality.prefixes_agree")
class PositionsFromTheEnd(RightModel):
    def make_more(self):
        self.pos_embed = nn.Embedding(self.args.max_seq_len, self.args.dim)

    def embed(self, input_ids, positions, targets, doc_ids):
        return self.tok_embed(input_ids) + self.pos_embed(input_ids.shape[1] - 1 - positions % input_ids.shape[1])


@mutant("causality.targets_do_not_leak")
class EmbedsTheTargets(RightModel):
    def embed(self, input_ids, positions, targets, doc_ids):
        x = self.tok_embed(input_ids)
        return x if targets is None else x + 0.1 * self.tok_embed(targets.clamp(min=0))


@mutant("batch.alone_equals_batch")
class NormalisesTheBatch(RightModel):
    class FFN(FeedForward):
        def __init__(self, args):
            super().__init__(args)
            self.batch_norm = nn.BatchNorm1d(args.inter_dim, track_running_stats=False)

        def forward(self, x):
            return self.down_proj(self.batch_norm(self.up_proj(x).flatten(0, 1)).view(*x.shape[:2], -1).relu())


@mutant("batch.alone_equals_batch")
class ExpertsHaveACapacity(MoEModel):
    """Beyond its capacity, filled in the order of the batch, an expert passes its tokens on to the next."""

    class FFN(MoE):
        def choose(self, scores):
            chosen = super().choose(scores)
            place = torch.nn.functional.one_hot(chosen[:, 0], self.args.n_routed_experts).cumsum(dim=0)
            full = place.gather(1, chosen[:, :1]) > 10
            return torch.where(full, (chosen + 1) % self.args.n_routed_experts, chosen)


@mutant("batch.order_does_not_matter")
class AddsTheBatchIndex(RightModel):
    def head(self, x, state):
        return super().head(x + 0.1 * torch.arange(len(x))[:, None, None], state)


@mutant("batch.alone_equals_batch")
class SwapsBatchAndTime(RightModel):
    """`view` where a transpose was meant: right for a batch of one."""

    class FFN(FeedForward):
        def forward(self, x):
            return super().forward(x.reshape(x.shape[1], x.shape[0], -1).transpose(0, 1).contiguous())
