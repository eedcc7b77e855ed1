"""Are the sequences of a batch independent? If not, a prediction depends on its neighbours in the batch."""

import torch

from checks.harness import ModelUnderTest, logits_of, require_close


@torch.no_grad()
def alone_equals_batch(tested: ModelUnderTest) -> None:
    """A sequence's logits do not depend on the other sequences of the batch, in train and in eval mode.

    Measured: each sequence of a batch alone against itself in the batch (in train mode where there is no dropout).
    Causes: batch normalisation, or another mean over dim 0; experts with a capacity, which the other sequences use up;
    a top-k over all tokens of the batch; `view(T, B, ...)` where a transpose was meant; positions or masks of sequence
    0 used for all sequences."""
    ids = tested.tokens(batch_size=4)
    for train in (False, True):
        model = tested.build().train(train)
        together = logits_of(model, ids)
        torch.manual_seed(1)
        if train and not torch.equal(logits_of(model, ids), together):
            return  # dropout: sequences of different batches draw different noise
        for index in range(len(ids)):
            what = f"{'train' if train else 'eval'} mode: sequence {index} alone against itself in the batch"
            require_close(logits_of(model, ids[index : index + 1])[0], together[index], what)


@torch.no_grad()
def order_does_not_matter(tested: ModelUnderTest) -> None:
    """Sequences in another order give the same logits in that order, and a duplicated sequence gives equal logits.

    Measured: a batch, its sequences in another order, and a batch of one sequence repeated.
    Causes: something indexed by its index in the batch; a capacity or a sort over the full batch; noise in eval mode.
    """
    model, ids = tested.build(), tested.tokens(batch_size=4)
    logits, order = logits_of(model, ids), [2, 0, 3, 1]
    require_close(logits_of(model, ids[order]), logits[order], "sequences in another order")
    repeated = logits_of(model, ids[:1].expand(3, -1))
    require_close(repeated, logits[:1].expand(3, -1, -1), "one sequence three times")
