"""Are the documents in one sequence independent?"""

import torch
from torch import Tensor

from checks.harness import ModelUnderTest, call, logits_of, next_tokens, require, require_close
from checks.harness.model_under_test import LONG, embedded_tokens, gradient_at_tokens, positions_text
from model.basemodel import BaseModel

OF_TOKENS = ("balance", "aux", "load", "index")  # in the names of losses that are means over tokens


def _documents(ids: Tensor, bounds: list[list[int]]) -> Tensor:
    """Return doc_ids (B, T) that count up at the given starts of each sequence; ids begin anywhere."""
    doc_ids = torch.full_like(ids, 3)
    for index, starts in enumerate(bounds):
        for start in starts:
            doc_ids[index, start:] += 1
    return doc_ids


def _bounds(total: int) -> list[list[int]]:
    """Four sequences of documents of uneven lengths, one token among them, no two sequences alike, some at 8s."""
    return [[5, 6, 13], [1, total - 2], [total // 2], [8, 16]]


@torch.no_grad()
def packed_equals_separate(tested: ModelUnderTest) -> None:
    """Each document's logits in a packed sequence are those it has alone, whatever its neighbours are.

    Measured: four sequences with documents at different places, one of a single token, each document against itself
    alone; in train mode too; one document per sequence against no doc_ids at all; and a sequence that ends in padding,
    whose id is -1, next to a sequence of padding alone.
    Causes: doc_ids ignored, or used in some layers only; the mask of sequence 0 used for all sequences; learned
    positions that do not start again at each document; a convolution, a token shift or a recurrent state that runs
    across the boundary; a document mask that replaces the causal one; doc_ids taken for indices; a mean over no token.
    """
    tested.needs("doc_ids")
    ids = tested.tokens(batch_size=4)
    bounds = _bounds(ids.shape[1])
    for train in (False, True):
        model = tested.build().train(train)
        if train and not torch.equal(logits_of(model, ids), logits_of(model, ids)):
            continue  # dropout
        packed = logits_of(model, ids, doc_ids=_documents(ids, bounds))
        _each_as_alone(model, ids, packed, bounds)
        one = logits_of(model, ids, doc_ids=torch.full_like(ids, 7))
        require_close(one, logits_of(model, ids), "one document per sequence against no doc_ids")
        padded = torch.zeros_like(ids[:2])
        padded[0, 5:], padded[1] = -1, -1
        before = logits_of(model, ids[:2], doc_ids=padded)
        require(before.isfinite().all(), "non-finite logits where a sequence is padding, doc_ids of -1")
        require_close(before[:1, :5], logits_of(model, ids[:1, :5]), "a document before padding, against alone")


def _each_as_alone(
    model: BaseModel, ids: Tensor, packed: Tensor, bounds: list[list[int]], tolerance: float = 2e-4
) -> None:
    for index, starts in enumerate(bounds):
        for start, end in zip([0, *starts], [*starts, ids.shape[1]]):
            require_close(
                packed[index : index + 1, start:end],
                logits_of(model, ids[index : index + 1, start:end]),
                f"sequence {index}, document at {start}..{end - 1}, packed against alone",
                tolerance,
            )


@torch.no_grad()
def long_sequences(tested: ModelUnderTest) -> None:
    """The same over 300 tokens: documents that begin within and at the borders of chunks and windows of usual sizes.

    Measured: two sequences, documents from 1 to 133 tokens, among them some that begin at 64, 128 and 256, each against
    itself alone; one document per sequence against no doc_ids at all.
    Causes: the state that one chunk hands to the next not dropped where a document begins with the chunk, or dropped
    for all documents of the chunk; windows and blocks counted from the start of the sequence; a mask that is right for
    the first chunk only.
    """
    tested.needs("doc_ids")
    model, ids = tested.build_long(), tested.tokens(batch_size=2, length=LONG)
    bounds = [[64, 65, 128, 250, 256], [3, 100, 130, 133, 192]]
    _each_as_alone(model, ids, logits_of(model, ids, doc_ids=_documents(ids, bounds)), bounds, 1e-3)
    one = logits_of(model, ids, doc_ids=torch.full_like(ids, 7))
    require_close(one, logits_of(model, ids), "one document per sequence against no doc_ids", 1e-3)


@torch.no_grad()
def padding_changes_no_loss(tested: ModelUnderTest) -> None:
    """No balance or index loss depends on padding, whose doc_ids are -1: not on its tokens, nor on how much there is.

    Measured: the task loss and the terms with balance, aux, load or index in their names, of two documents followed by
    padding and of a sequence of padding alone: with other tokens in place of the padding (the first four stay, which
    multi-token heads may read), and with less of it.
    Causes: a balance loss or an index loss that is a mean over all positions; a padding mask that reaches the loads
    and not the loss; padding known by its token.
    """
    tested.needs("doc_ids")
    ids = tested.tokens(batch_size=2)
    end, total = max(2, ids.shape[1] // 2), ids.shape[1]
    doc_ids = torch.zeros_like(ids)
    doc_ids[:, end // 2 :] = 1
    doc_ids[0, end:], doc_ids[1] = -1, -1
    model = tested.build()

    def terms(ids: Tensor) -> dict[str, Tensor]:
        docs = doc_ids[:, : ids.shape[1]]
        targets = next_tokens(ids).masked_fill(docs != docs.roll(-1, 1), -100).masked_fill(docs < 0, -100)
        targets[:, end - 1 :] = -100
        _, loss, other_vars = call(model, ids, targets=targets, doc_ids=docs)
        named = {k: v for k, v in other_vars.items() if k.startswith("loss/") and any(w in k for w in OF_TOKENS)}
        return {"the task loss": tested.task_loss(loss, other_vars), **named}

    want = terms(ids)
    changed = doc_ids < 0
    changed[0, : end + 4] = False  # a multi-token head of the last token reads what follows it
    other = torch.where(changed, tested.tokens(batch_size=2, seed=9), ids)
    cases = {"other tokens in place of padding": other, "less padding": ids[:, : max(end + 1, total - 3)]}
    for what, tokens in cases.items():
        for key, value in terms(tokens).items():
            difference = (value - want[key]).abs().item()
            allowed = 1e-4 * max(want[key].abs().item(), 1e-6)
            require(
                difference <= allowed,
                f"{key} is {want[key].item():.6g}, with {what} {value.item():.6g}: padding counts in it",
            )


def gradient_stays_in_the_document(tested: ModelUnderTest) -> None:
    """No logit has a gradient to a token of another document.

    Measured: one backward pass per position, in a sequence of four documents.
    Causes: as for `packed_equals_separate`.
    """
    tested.needs("doc_ids")
    model, ids = tested.build(), tested.tokens(batch_size=1)
    doc_ids = _documents(ids, _bounds(ids.shape[1])[:1])
    with embedded_tokens(model) as outputs:
        logits = logits_of(model, ids, doc_ids=doc_ids)
    for t in range(ids.shape[1]):
        size = gradient_at_tokens(logits[0, t].square().sum(), outputs)[0]
        foreign = ((size > 2e-5 * size.max()) & (doc_ids[0] != doc_ids[0, t])).nonzero()[:, 0]
        require(
            not len(foreign),
            f"the logit at {t} has a gradient to tokens of other documents, at {positions_text(foreign)}",
        )


def packed_loss_equals_separate(tested: ModelUnderTest) -> None:
    """The task loss of packed documents is that of the documents alone, weighted by their targets.

    Measured: four documents in a sequence, without targets at the boundaries, against each alone.
    Causes: as for `packed_equals_separate`, on the path that computes the loss.
    """
    tested.needs("doc_ids")
    model, ids = tested.build(), tested.tokens(batch_size=1)
    starts = _bounds(ids.shape[1])[0]
    doc_ids, targets = _documents(ids, [starts]), next_tokens(ids)
    for start in [*starts, ids.shape[1]]:
        targets[:, start - 1] = -100
    packed = tested.task_loss(*call(model, ids, targets=targets, doc_ids=doc_ids)[1:])
    total, count = torch.zeros((), dtype=torch.float64), 0
    for start, end in zip([0, *starts], [*starts, ids.shape[1]]):
        part = targets[:, start:end]
        n = int((part != -100).sum())
        alone = tested.task_loss(*call(model, ids[:, start:end], targets=part)[1:])
        total, count = total + alone.double() * n, count + n
    require_close(packed.double(), total / count, "packed loss against the mean of the documents alone", 1e-4)


def losses_stay_in_the_document(tested: ModelUnderTest) -> None:
    """The loss on one document has no gradient to another: no term of it crosses a boundary.

    Measured: the gradient of each `loss/*` at the tokens of the first document, with targets in the second only,
    against that without any target (a balance loss does not look at targets).
    Causes: multi-token prediction that predicts beyond the boundary, or reads an embedding from beyond it; an auxiliary
    head that gets no doc_ids.
    """
    tested.needs("doc_ids")
    tested.needs_repeatable_backward()
    model, ids = tested.build(), tested.tokens(batch_size=1)
    boundary = ids.shape[1] // 2
    doc_ids, targets = _documents(ids, [[boundary]]), next_tokens(ids)
    targets[:, :boundary] = -100

    def gradients(targets: Tensor) -> dict[str, Tensor]:
        with embedded_tokens(model) as outputs:
            _, loss, other_vars = call(model, ids, targets=targets, doc_ids=doc_ids)
        terms = {k: v for k, v in other_vars.items() if k.startswith("loss/")} or {"loss": loss}
        return {k: gradient_at_tokens(v, outputs)[0] for k, v in terms.items()}

    nothing, second = gradients(torch.full_like(ids, -100)), gradients(targets)
    for key, size in second.items():
        crossed = ((size - nothing[key])[:boundary].abs() > 1e-5 * size.max() + 1e-9).nonzero()[:, 0]
        require(
            not len(crossed), f"{key} of the second document has a gradient to the first, at {positions_text(crossed)}"
        )
