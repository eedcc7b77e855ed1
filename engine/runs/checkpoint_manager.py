"""Checkpoint policy: schedule, retry after a failed save, retention, and disk space."""

import errno
import math
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.distributed import process_group
from engine.distributed.fsdp import is_sharded, local
from engine.runs.checkpoint import (
    TrainOptimizer,
    canonical_names,
    find_checkpoints,
    read_manifest,
    save_checkpoint,
    step_of,
    verify_checkpoint,
    weights_bytes,
)
from utils.atomic import folder_bytes, remove, remove_folder
from utils.errors import UserError
from utils.log import format_bytes, warn

MEASURED: tuple[str, ...] = ("val_loss", "val_targets")  # the evaluation's entries in the manifest
PAUSE_SECONDS = 2.0  # before a failed save is tried again: the cause may pass


class RetentionSettings(Protocol):
    """The settings of a training that decide which checkpoints are saved and kept."""

    save_interval: int
    keep_last: int
    keep_every: int
    keep_best: bool


class CheckpointManager:
    """Saves the checkpoints of a run. Every process calls its methods; the main process writes.

    Of a sharded model each process writes its shards of a step checkpoint, but final/ is one file.
    """

    def __init__(
        self,
        run: Path,
        config: RetentionSettings,
        model: torch.nn.Module,
        optimizer: TrainOptimizer,
        metadata: dict[str, Any],
    ):
        self.run = run
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.metadata = metadata  # further keys of the manifest
        self.weights_bytes, self.bytes = checkpoint_bytes(model, optimizer)
        self.retry_at = 0  # the step at which a failed save is tried again
        self.delay = 1  # steps until then

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps: by --save_interval, or because the last save failed."""
        interval = self.config.save_interval
        return (interval > 0 and step % interval == 0) or step == self.retry_at

    def save(self, state: dict[str, Any], val: dict[str, Any], must: bool = False) -> None:
        """Save a step checkpoint. A failed save is tried again 1, 2, 4, ... steps later.

        val: the last evaluation, with its step. must: a failed save is a UserError.
        """
        step = state["step"]
        measured = {key: val[key] for key in MEASURED} if val.get("step") == step else {}
        problem = self._save(self.run / "checkpoints" / f"step-{step:08d}", self.optimizer, state, measured)
        if not problem:
            self.retry_at = 0
            self.delay = 1
        elif must:
            raise UserError(
                f"step {step} could not be saved ({problem}): make room; the same command then resumes "
                "from the checkpoint before"
            )
        else:
            self.retry_at = step + self.delay
            self.delay *= 2
            warn(
                f"step {step}: the checkpoint could not be saved ({problem}); the one before is kept, "
                f"the next try is at step {self.retry_at}"
            )

    def save_final(self, state: dict[str, Any], val: dict[str, Any]) -> None:
        """Save the weights as final/; UserError when that fails, when no step was taken or the loss is non-finite."""
        if state["step"] and state["skipped"] >= state["step"]:
            raise UserError(
                f"not one of {state['step']} steps could be taken, so there are no final weights: "
                "lower --max_lr, use --precision=fp32, or look at the data"
            )
        if val.get("val_loss") is not None and not math.isfinite(val["val_loss"]):
            raise UserError(
                f"the held-out loss is {val['val_loss']}, so there are no final weights: lower --max_lr, "
                "use --precision=fp32, or look at the model"
            )
        measured = {key: val[key] for key in MEASURED if key in val}
        problem = self._save(self.run / "final", None, state, measured)
        if problem:
            raise UserError(
                f"{self.run / 'final'} could not be saved ({problem}): make room; the same command then "
                "resumes from the last checkpoint"
            )

    def best(self) -> str | None:
        """The name of the step checkpoint with the lowest held-out loss, of those evaluated at their step."""
        best = best_of(find_checkpoints(self.run))
        return best.name if best else None

    def _save(
        self, target: Path, optimizer: TrainOptimizer | None, state: dict[str, Any], measured: dict[str, Any]
    ) -> str | None:
        """Save, trying twice; returns the main process's error on all processes, or None."""
        refuse_nan(self.model, state["step"])
        problem = None
        collective = is_sharded(self.model) and optimizer is not None
        weights = weights_bytes(self.model) if is_sharded(self.model) and optimizer is None else None
        if process_group.is_main() or collective:
            try:
                self._write(target, optimizer, state, measured, weights)
            except OSError as error:  # the same on all processes that write together
                warn(f"saving {target} failed ({error}): making room, and trying again")
                time.sleep(PAUSE_SECONDS)
                if process_group.is_main():
                    prune_checkpoints(self.run, 1, self.config.keep_every, self.config.keep_best)
                try:
                    self._write(target, optimizer, state, measured, weights)
                except OSError as again:
                    problem = str(again)
        return process_group.broadcast_object(problem)  # the other processes wait here until it is written

    def _write(
        self,
        target: Path,
        optimizer: TrainOptimizer | None,
        state: dict[str, Any],
        measured: dict[str, Any],
        weights: bytes | None,
    ) -> None:
        need = self.bytes if optimizer else self.weights_bytes
        free = shutil.disk_usage(self.run).free
        if is_sharded(self.model) and optimizer:
            free = process_group.broadcast_object(free)  # the same decision on all processes
        if free < need:
            raise OSError(errno.ENOSPC, f"{format_bytes(need)} needed, {format_bytes(free)} free on the disk")
        metadata = {**self.metadata, "step": state["step"], "tokens": state["tokens"], **measured}
        save_checkpoint(target, self.model, optimizer, state, metadata, weights)
        if optimizer and process_group.is_main():
            self.bytes = folder_bytes(target)
            prune_checkpoints(self.run, self.config.keep_last, self.config.keep_every, self.config.keep_best, target)


def prune_checkpoints(
    run: Path, keep_last: int, keep_every: int = 0, keep_best: bool = False, written: Path | None = None
) -> None:
    """Delete step checkpoints except the newest `keep_last`, those at multiples of `keep_every`, and the best.

    written: the one just saved, which always stays. Later ones are deleted: the run resumed from before them, because
    they were damaged. Only valid checkpoints, which are read completely, count as the newest. Without a valid one
    nothing is deleted.
    """
    folders = find_checkpoints(run)
    if written is not None:
        folders = [folder for folder in folders if step_of(folder) <= step_of(written)]
    newest: list[Path] = []
    for folder in folders:
        if len(newest) < keep_last and (folder == written or verify_checkpoint(folder) is None):
            newest.append(folder)
    if not newest:
        return
    keep = {*newest, best_of(folders) if keep_best else None}
    keep |= {folder for folder in folders if keep_every and step_of(folder) % keep_every == 0}
    for folder in find_checkpoints(run):
        if folder not in keep:
            try:
                remove_folder(folder)
            except OSError as error:
                warn(f"{folder} could not be deleted ({error})")
    for leftover in (run / "checkpoints").glob(".step-*"):  # of saves that a crash interrupted
        remove(leftover)


def best_of(folders: list[Path]) -> Path | None:
    """The checkpoint with the lowest held-out loss, of those measured on as much data as the first of them."""
    measured = []
    for folder in folders:
        manifest = read_manifest(folder) or {}
        loss = manifest.get("val_loss")
        if loss is not None and math.isfinite(loss) and verify_checkpoint(folder, sizes_only=True) is None:
            measured.append((folder, loss, manifest.get("val_targets")))
    return min((m for m in measured if m[2] == measured[0][2]), key=lambda m: m[1])[0] if measured else None


@torch.no_grad()
def refuse_nan(model: torch.nn.Module, step: int) -> None:
    """UserError when a weight or a saved buffer holds a NaN: it must not replace a good checkpoint."""
    tensors = {name: local(tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    counts = {name: torch.isnan(tensor).any().float() for name, tensor in tensors.items()}
    if is_sharded(model):  # a process sees its own shards only, and all must decide the same
        counts = process_group.sum_tensors(counts)
    for name, count in counts.items():
        if count:
            raise UserError(
                f"step {step}: {name} holds a NaN, so this state is not saved: lower --max_lr or use "
                "--precision=fp32; the last checkpoint is kept"
            )


# ---------------------------------------------------------------------------------------------------- disk space


def checkpoint_bytes(model: torch.nn.Module, optimizer: TrainOptimizer) -> tuple[int, int]:
    """Estimate the bytes of (the weights, a checkpoint): fp32 weights, and with the moments of the optimizer."""
    saved = set(canonical_names(model).values())
    weights = sum(
        tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
        for name, tensor in model.state_dict().items()
        if name in saved
    )
    moments = sum(
        parameter.numel() * 4 * (2 if isinstance(part, torch.optim.AdamW) else 1)
        for part in optimizer.all
        for group in part.param_groups
        for parameter in group["params"]
    )
    return weights, weights + moments
