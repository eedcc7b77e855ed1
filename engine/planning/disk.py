"""The disk space of a run, in bytes: what its checkpoints will take, and what is free."""

import shutil
from pathlib import Path

import torch

from engine.runs.checkpoint_manager import RetentionSettings, checkpoint_bytes
from engine.runs.protocols import TrainOptimizer
from utils.atomic import folder_bytes
from utils.errors import UserError
from utils.log import format_bytes


def room_for_checkpoints(
    config: RetentionSettings, model: torch.nn.Module, optimizer: TrainOptimizer, total_steps: int
) -> tuple[int, int]:
    """Return (checkpoints that a run keeps at its end, bytes for them, the one being written and the final weights)."""
    weights, full = checkpoint_bytes(model, optimizer)
    saves = total_steps // config.save_interval + 1 if config.save_interval else 1
    every = total_steps // config.keep_every if config.keep_every else 0
    kept = min(saves, config.keep_last + config.keep_best + every)
    return kept, (kept + 1) * full + weights


def disk_free(run: Path) -> int:
    """Bytes that a run may fill: those free on its disk, and those of its own checkpoints, which it replaces."""
    there = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free + folder_bytes(run / "checkpoints") + folder_bytes(run / "final")


def ensure_room(
    run: Path, config: RetentionSettings, model: torch.nn.Module, optimizer: TrainOptimizer, total_steps: int
) -> None:
    """UserError when the disk cannot hold the checkpoints that the run will keep, and the one being written."""
    kept, need = room_for_checkpoints(config, model, optimizer, total_steps)
    free = disk_free(run)
    if free < need:
        raise UserError(
            f"{run} needs about {format_bytes(need)} for {kept} checkpoints, the one being written and the "
            f"final weights, and the disk has {format_bytes(free)} for it: make room, lower --keep_last, "
            "or choose another --output_path"
        )
