"""Are the rows of a batch independent? If not, a prediction depends on who else was asked."""

import torch

from checks.harness.model_under_test import logits_of, require_close


@torch.no_grad()
def alone_equals_batch(subject):
    """A row's logits do not depend on the other rows of the batch, in train and in eval mode.

    Measured: each row of a batch alone against itself in the batch (in train mode where there is no dropout).
    Causes: batch normalisation, or another mean over dim 0; experts with a capacity, which the other rows use up; a
    top-k over all tokens of the batch; `view(T, B, ...)` where a transpose was meant; positions or masks of row 0 used
    for all rows.
    """
    ids = subject.tokens(rows=4)
    for train in (False, True):
        model = subject.build().train(train)
        together = logits_of(model, ids)
        torch.manual_seed(1)
        if train and not torch.equal(logits_of(model, ids), together):
            return  # dropout: rows of different batches draw different noise
        for row in range(len(ids)):
            what = f"{'train' if train else 'eval'} mode: row {row} alone against in a batch"
            require_close(logits_of(model, ids[row : row + 1])[0], together[row], what)


@torch.no_grad()
def order_does_not_matter(subject):
    """Rows in another order give the same logits in that order, and a row given twice gives the same twice.

    Measured: a batch, its rows in another order, and a batch of one row repeated.
    Causes: something indexed by the row number; a capacity or a sort over the whole batch; noise in eval mode.
    """
    model, ids = subject.build(), subject.tokens(rows=4)
    logits, order = logits_of(model, ids), [2, 0, 3, 1]
    require_close(logits_of(model, ids[order]), logits[order], "rows in another order")
    repeated = logits_of(model, ids[:1].expand(3, -1))
    require_close(repeated, logits[:1].expand(3, -1, -1), "one row three times")
