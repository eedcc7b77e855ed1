"""Held-out loss, as nats a target token and as bits a character."""

import math

import torch

from engine import distributed
from engine.data import IGNORE
from engine.loader import held_out_batches, to_device


@torch.no_grad()
def held_out_loss(model, forward, rows, batch_rows: int, limit: int, device, autocast,
                  trim: bool = False) -> dict[str, float | None]:
    """Return {"val_loss", "val_bpc", "val_targets"} over `limit` rows (0: all).

    Weighted by valid targets over all processes. The loss is `other_vars["loss/ce"]` where the model reports it, for
    auxiliary terms predict nothing. Bits a character = nats a target x targets a character / ln 2, which makes
    tokenizers comparable; None when the data does not say how many characters it holds.
    """
    was_training = model.training
    model.eval()
    nats, targets = torch.zeros((), device=device), 0  # the sum stays on the device: one wait at the end
    try:
        for batch in held_out_batches(rows, batch_rows, limit, distributed.rank(), distributed.world_size(),
                                      trim):
            count = int((batch["targets"] != IGNORE).sum())
            with autocast():
                _, loss, other_vars = forward(**to_device(batch, device))
            nats += other_vars.get("loss/ce", loss).float() * count
            targets += count
    finally:
        model.train(was_training)
    nats, targets = distributed.sum_numbers([nats.item(), targets])
    mean = nats / max(1, targets)
    rate = rows.targets_per_character()
    return {"val_loss": mean, "val_bpc": mean * rate / math.log(2) if rate else None, "val_targets": int(targets)}
