"""Held-out loss, as nats a target token and as bits a character."""

import math

import torch

from engine.data.loader import held_out_batches, to_device
from engine.data.sequences import IGNORE
from engine.distributed import process_group


@torch.no_grad()
def held_out_loss(
    model, forward, rows, characters, batch_rows: int, limit: int, device, autocast, trim: bool = False, stop=None
) -> dict[str, float | None] | None:
    """Return {"val_loss", "val_bpc", "val_targets"} over `limit` rows (0: all); None when `stop.wanted` came before.

    Weighted by valid targets over all processes. The loss is `other_vars["loss/ce"]` where the model reports it, for
    auxiliary terms predict nothing. Bits a character are the same nats over the characters of the same targets, which
    makes tokenizers comparable; `characters` (V,) holds how many begin in each token.
    """
    was_training = model.training
    model.eval()
    nats, targets, written = torch.zeros((), device=device), 0, 0  # the sum stays on the device: one wait at the end
    try:
        for batch in held_out_batches(rows, batch_rows, limit, process_group.rank(), process_group.world_size(), trim):
            if stop is not None and process_group.sum_numbers([stop.wanted])[0]:  # all processes stop at one batch
                return None
            count = int((batch["targets"] != IGNORE).sum())
            with autocast():
                _, loss, other_vars = forward(**to_device(batch, device))
            nats += other_vars.get("loss/ce", loss).float() * count
            targets, written = targets + count, written + characters_of(characters, [batch])
    finally:
        model.train(was_training)
    nats, targets, written = process_group.sum_numbers([nats.item(), targets, written])
    return {
        "val_loss": nats / max(1, targets),
        "val_bpc": nats / math.log(2) / written if written else None,
        "val_targets": int(targets),
    }


def characters_of(characters, batches) -> int:
    """How many characters the targets of these batches are; the batches lie on the CPU."""
    targets = (batch["targets"][batch["targets"] != IGNORE].numpy() for batch in batches)
    return sum(int(characters[ids].sum()) for ids in targets)
