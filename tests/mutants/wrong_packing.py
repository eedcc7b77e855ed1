"""Documents in one sequence that see each other."""

import torch
import torch.nn.functional as F
from torch import nn

from .right import Attention, FeedForward, RightModel, mutant
from .wrong_state import CarriesAMean

PACKED = "packing.packed_equals_separate"


@mutant(PACKED)
class IgnoresDocuments(RightModel):
    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            return super().visible(positions, n_keys, state, None)


@mutant("packing.gradient_stays_in_the_document")
class IgnoresDocumentsInOneLayer(RightModel):
    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            return super().visible(positions, n_keys, state, doc_ids if self.layer else None)


@mutant(PACKED)
class TakesTheDocumentsOfSequenceZero(RightModel):
    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            return super().visible(positions, n_keys, state, None if doc_ids is None else doc_ids[:1])


@mutant(PACKED)
class SeesTheDocumentBefore(RightModel):
    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            seen = super().visible(positions, n_keys, state, None)
            return seen if doc_ids is None else seen & (doc_ids[:, :, None] - doc_ids[:, None, :] <= 1)


@mutant(PACKED)
class DocumentMaskIsNotCausal(RightModel):
    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            if doc_ids is None:
                return super().visible(positions, n_keys, state, None)
            return doc_ids[:, :, None] == doc_ids[:, None, :]


@mutant(PACKED)
class LearnedPositionsRunOn(RightModel):
    def make_more(self):
        self.pos_embed = nn.Embedding(self.args.max_seq_len, self.args.dim)

    def embed(self, input_ids, positions, targets, doc_ids):
        return self.tok_embed(input_ids) + self.pos_embed(positions)


@mutant(PACKED)
class MeanRunsOn(RightModel):
    class Attention(CarriesAMean):
        def forward(self, x, positions, state, doc_ids):
            return super().forward(x, positions, state, None)


@mutant(PACKED)
class ConvolutionRunsOn(RightModel):
    """Attention keeps documents apart, a convolution in the feed-forward does not know of them."""

    def forward(self, input_ids, targets=None, doc_ids=None):  # no state: the convolution has none
        return super().forward(input_ids, targets, None, doc_ids)

    class FFN(FeedForward):
        def __init__(self, args):
            super().__init__(args)
            self.conv = nn.Conv1d(args.inter_dim, args.inter_dim, 3, groups=args.inter_dim)

        def forward(self, x):
            h = F.pad(self.up_proj(x).transpose(1, 2), (2, 0))
            return self.down_proj(F.silu(self.conv(h).transpose(1, 2)))


@mutant("packing.losses_stay_in_the_document")
class PredictsBeyondTheBorder(RightModel):
    """A second head predicts the token after the next, also when that is in another document."""

    def make_more(self):
        self.second_head = nn.Linear(self.args.dim, self.args.vocab_size, bias=False)

    def head(self, x, state):
        return super().head(x, state), self.second_head(x)

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        (logits, second), loss, other_vars = super().forward(input_ids, None, state, doc_ids)
        if targets is None:
            return logits, None, other_vars
        further = 0.3 * self.cross_entropy(second[:, :-1], targets[:, 1:])
        ce = self.cross_entropy(logits, targets)
        return logits, ce + further, {"loss/ce": ce, "loss/further": further}


@mutant("packing.packed_loss_equals_separate")
class LosesTheDocumentsInTraining(RightModel):
    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        return super().forward(input_ids, targets, state, doc_ids if targets is None else None)


@mutant(PACKED)
class DocumentsCountFromTheFirstId(RightModel):
    """Takes doc_ids for small integers, though they may begin anywhere."""

    class Attention(Attention):
        def visible(self, positions, n_keys, state, doc_ids):
            return super().visible(positions, n_keys, state, None if doc_ids is None else torch.clamp(doc_ids, max=4))
