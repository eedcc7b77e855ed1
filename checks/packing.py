"""Do documents in one row keep apart?"""

import torch

from .subject import require_close


@torch.no_grad()
def packed_equals_separate(subject):
    """Each document's logits in a packed row are those it has alone, whatever its neighbours are."""
    subject.needs("doc_ids")
    model, ids = subject.build(), subject.tokens(rows=2)
    total = ids.shape[1]
    for bounds in ([0, 5, 6, 13, total], [0, 1, total - 2, total]):
        doc_ids = torch.zeros_like(ids)
        for number, start in enumerate(bounds[:-1]):
            doc_ids[:, start:] = number
        packed = model(ids, doc_ids=doc_ids)[0]
        for start, end in zip(bounds, bounds[1:]):
            alone = model(ids[:, start:end])[0]
            require_close(packed[:, start:end], alone, f"document at {start}..{end} packed against alone")


def packed_loss_equals_separate(subject):
    """The task losses of packed documents are those of the documents alone, weighted by their targets."""
    subject.needs("doc_ids")
    model, ids = subject.build(), subject.tokens(rows=1)
    bounds = [0, 5, 12, ids.shape[1]]
    doc_ids, targets = torch.zeros_like(ids), ids.roll(-1, 1)
    for number, (start, end) in enumerate(zip(bounds, bounds[1:])):
        doc_ids[:, start:] = number
        targets[:, end - 1] = -100
    packed = model(ids, targets=targets, doc_ids=doc_ids)[2]
    total, count = 0.0, 0
    for start, end in zip(bounds, bounds[1:]):
        part = targets[:, start:end]
        n = (part != -100).sum().item()
        alone = model(ids[:, start:end], targets=part)[2]
        total, count = total + alone["loss/ce"].double() * n, count + n
    require_close(packed["loss/ce"].double(), total / count, "packed loss against the documents alone", 1e-5)
