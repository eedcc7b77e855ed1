"""When a checkpoint is saved, what becomes of a save that fails, which checkpoints stay, and room for them all."""

import errno
import math
import shutil
import time
from pathlib import Path

import torch

from engine.distributed import process_group
from engine.distributed.fsdp import is_sharded, local
from engine.runs.checkpoint import (
    canonical_names,
    damage,
    find_checkpoints,
    read_manifest,
    save_checkpoint,
    step_of,
    weights_bytes,
)
from utils.atomic import folder_bytes, remove, remove_folder
from utils.errors import UserError
from utils.log import format_bytes, warn

PAUSE_SECONDS = 2.0  # before a failed save is tried again: what filled the disk may be a passing thing


class CheckpointManager:
    """Saves the checkpoints of a run. Every process calls its methods; the main one writes.

    Of a model that is shared out each process writes its part of a step checkpoint, but final/ is one whole file.
    """

    def __init__(self, run: Path, config, model, optimizer, about: dict):
        self.run, self.config, self.model, self.optimizer, self.about = run, config, model, optimizer, about
        self.weights_bytes, self.bytes = checkpoint_bytes(model, optimizer)
        self.retry_at, self.delay = 0, 1  # the step at which a failed save is tried again, and how many steps that was

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps: by --save_interval, or because the last one failed."""
        interval = self.config.save_interval
        return (interval > 0 and step % interval == 0) or step == self.retry_at

    def save(self, state: dict, val: dict, must: bool = False) -> None:
        """Save a step checkpoint; one that fails is tried again 1, 2, 4, ... steps later, `must`: it is a UserError.

        val: the last held-out evaluation, with its step.
        """
        step = state["step"]
        measured = {key: val[key] for key in ("val_loss", "val_targets")} if val.get("step") == step else {}
        problem = self._save(self.run / "checkpoints" / f"step-{step:08d}", self.optimizer, state, measured)
        if not problem:
            self.retry_at, self.delay = 0, 1
        elif must:
            raise UserError(
                f"step {step} could not be saved ({problem}): make room; the same command then goes on "
                "from the checkpoint before"
            )
        else:
            self.retry_at, self.delay = step + self.delay, self.delay * 2
            warn(
                f"step {step}: the checkpoint could not be saved ({problem}); the one before is kept, "
                f"the next try is at step {self.retry_at}"
            )

    def save_final(self, state: dict, val: dict) -> None:
        """Save the weights alone, as final/; UserError when that fails, or when there is nothing worth the name."""
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
        measured = {key: val[key] for key in ("val_loss", "val_targets") if key in val}
        problem = self._save(self.run / "final", None, state, measured)
        if problem:
            raise UserError(
                f"{self.run / 'final'} could not be saved ({problem}): make room; the same command then "
                "goes on from the last checkpoint"
            )

    def best(self) -> str | None:
        """The name of the step checkpoint with the lowest held-out loss, of those evaluated at their step."""
        best = best_of(find_checkpoints(self.run))
        return best.name if best else None

    def _save(self, target: Path, optimizer, state: dict, measured: dict) -> str | None:
        """What went wrong on the main process, told to all, or None. A failed save is tried a second time."""
        refuse_broken(self.model, state["step"])
        problem, together = None, is_sharded(self.model) and optimizer is not None
        weights = weights_bytes(self.model) if is_sharded(self.model) and optimizer is None else None
        if process_group.is_main() or together:
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
        return process_group.broadcast_object(problem)  # the others wait here until it is written

    def _write(self, target: Path, optimizer, state: dict, measured: dict, weights: bytes | None) -> None:
        need, free = self.bytes if optimizer else self.weights_bytes, shutil.disk_usage(self.run).free
        if is_sharded(self.model) and optimizer:
            free = process_group.broadcast_object(free)  # one answer for all
        if free < need:
            raise OSError(errno.ENOSPC, f"{format_bytes(need)} needed, {format_bytes(free)} free on the disk")
        about = {**self.about, "step": state["step"], "tokens": state["tokens"], **measured}
        save_checkpoint(target, self.model, optimizer, state, about, weights)
        if optimizer and process_group.is_main():
            self.bytes = folder_bytes(target)
            prune_checkpoints(self.run, self.config.keep_last, self.config.keep_every, self.config.keep_best, target)


def prune_checkpoints(
    run: Path, keep_last: int, keep_every: int = 0, keep_best: bool = False, written: Path | None = None
) -> None:
    """Delete step checkpoints but the newest `keep_last`, those at multiples of `keep_every`, and the best.

    written: the one just saved, which always stays. Those beyond it go: the run came from before them because they were
    damaged. A damaged one never counts as one of the newest: each that counts is read through. With no valid checkpoint
    nothing is deleted.
    """
    folders, whole = find_checkpoints(run), []
    if written is not None:
        folders = [folder for folder in folders if step_of(folder) <= step_of(written)]
    for folder in folders:
        if len(whole) < keep_last and (folder == written or damage(folder) is None):
            whole.append(folder)
    if not whole:
        return
    keep = {*whole, best_of(folders) if keep_best else None}
    keep |= {folder for folder in folders if keep_every and step_of(folder) % keep_every == 0}
    for folder in find_checkpoints(run):
        if folder not in keep:
            try:
                remove_folder(folder)
            except OSError as error:
                warn(f"{folder} could not be deleted ({error})")
    for leftover in (run / "checkpoints").glob(".step-*"):  # of saves that a crash cut short
        remove(leftover)


def best_of(folders: list[Path]) -> Path | None:
    """The checkpoint with the lowest held-out loss, among those measured on as much data as the first of them."""
    measured = []
    for folder in folders:
        about = read_manifest(folder) or {}
        loss = about.get("val_loss")
        if loss is not None and math.isfinite(loss) and damage(folder, sizes_only=True) is None:
            measured.append((folder, loss, about.get("val_targets")))
    return min((m for m in measured if m[2] == measured[0][2]), key=lambda m: m[1])[0] if measured else None


@torch.no_grad()
def refuse_broken(model, step: int) -> None:
    """UserError when the weights or a saved buffer hold a NaN: they must not take a good checkpoint's place."""
    tensors = {name: local(tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    broken = {name: torch.isnan(tensor).any().float() for name, tensor in tensors.items()}
    if is_sharded(model):  # a process sees its own part only, and all must say the same
        broken = process_group.sum_tensors(broken)
    for name, count in broken.items():
        if count:
            raise UserError(
                f"step {step}: {name} holds a NaN, so this state is not saved: lower --max_lr or use "
                "--precision=fp32; the last checkpoint is kept"
            )


def checkpoint_bytes(model, optimizer) -> tuple[int, int]:
    """About how many bytes the weights alone and a whole checkpoint take: fp32, and the moments of the optimizer."""
    kept = set(canonical_names(model).values())
    weights = sum(
        tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
        for name, tensor in model.state_dict().items()
        if name in kept
    )
    moments = sum(
        parameter.numel() * 4 * (2 if isinstance(part, torch.optim.AdamW) else 1)
        for part in optimizer.all
        for group in part.param_groups
        for parameter in group["params"]
    )
    return weights, weights + moments


def process_bytes(model, optimizer) -> tuple[int, int, int]:
    """Bytes of weights and saved buffers, of gradients, and of the optimizer's moments that this process holds."""
    weights, whole = checkpoint_bytes(model, optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    mine, all_of_them = (sum(of(p).numel() for p in parameters) for of in (local, lambda p: p))
    share = mine / all_of_them
    return round(weights * share), 4 * mine, round((whole - weights) * share)


def room_for_checkpoints(config, model, optimizer, total_steps: int) -> tuple[int, int]:
    """Return (checkpoints that a run keeps at its end, bytes for them, the one being written and the final weights)."""
    weights, whole = checkpoint_bytes(model, optimizer)
    saves = total_steps // config.save_interval + 1 if config.save_interval else 1
    every = total_steps // config.keep_every if config.keep_every else 0
    kept = min(saves, config.keep_last + config.keep_best + every)
    return kept, (kept + 1) * whole + weights


def disk_free(run: Path) -> int:
    """Bytes that a run may fill: the free ones of its disk, and those that its own checkpoints take already."""
    there = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free + folder_bytes(run / "checkpoints") + folder_bytes(run / "final")


def ensure_room(run: Path, config, model, optimizer, total_steps: int) -> None:
    """UserError when the disk cannot hold the checkpoints that the run is going to keep, and the one being written."""
    (kept, need), free = room_for_checkpoints(config, model, optimizer, total_steps), disk_free(run)
    if free < need:
        raise UserError(
            f"{run} needs about {format_bytes(need)} for {kept} checkpoints, the one being written and the "
            f"final weights, and the disk has {format_bytes(free)} for it: make room, lower --keep_last, "
            "or choose another --output_path"
        )
