"""Held-out loss, in nats per target token and in bits per character."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from engine.data.loader import held_out_batches, to_device
from engine.data.sequences import IGNORE, Sequences
from engine.distributed import process_group
from engine.training.stop_signal import StopSignal


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module,
    forward: Callable[..., Any],
    data: Sequences,
    characters: np.ndarray,
    batch_size: int,
    limit: int,
    device: torch.device,
    compute_dtype: Callable[[], AbstractContextManager],
    trim: bool = False,
    stop: StopSignal | None = None,
) -> dict[str, Any] | None:
    """Return {"val_loss", "val_bpc", "val_targets"} over `limit` sequences (0: all); None when `stop` came first.

    Weighted by valid targets over all processes. The loss is `other_vars["loss/ce"]` where the model reports it,
    because auxiliary terms predict nothing. Bits per character are the same nats over the characters of the same
    targets, which makes tokenizers comparable; characters (V,) holds how many begin in each token.
    """
    was_training = model.training
    model.eval()
    nats = torch.zeros((), device=device)  # the sum stays on the device: the host waits once, at the end
    targets = written = 0
    try:
        for batch in held_out_batches(data, batch_size, limit, process_group.rank(), process_group.world_size(), trim):
            if stop is not None and process_group.sum_numbers([stop.wanted])[0]:  # all processes stop at one batch
                return None
            count = int((batch["targets"] != IGNORE).sum())
            with compute_dtype():
                _, loss, other_vars = forward(**to_device(batch, device))
            nats += other_vars.get("loss/ce", loss).float() * count
            targets += count
            written += characters_of(characters, [batch])
    finally:
        model.train(was_training)
    total_nats, total_targets, total_written = process_group.sum_numbers([nats.item(), targets, written])
    return {
        "val_loss": total_nats / max(1, total_targets),
        "val_bpc": total_nats / math.log(2) / total_written if total_written else None,
        "val_targets": int(total_targets),
    }


def characters_of(characters: np.ndarray, batches: Iterable[dict[str, torch.Tensor]]) -> int:
    """How many characters begin in the targets of these batches, which are on the CPU."""
    targets = (batch["targets"][batch["targets"] != IGNORE].numpy() for batch in batches)
    return sum(int(characters[ids].sum()) for ids in targets)
