"""The file format of a checkpoint directory, which is complete or does not exist.

A checkpoint is written to a hidden sibling, every file is fsynced, `manifest.json` (name, size and sha256 of each file,
and its own sha256) comes last, then the directory is renamed. Nothing that is read can execute code: safetensors, JSON,
and `torch.load(weights_only=True)`.
"""

import functools
import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError

from engine.distributed.fsdp import full_tensor, is_dtensor, is_sharded, shard_like
from engine.distributed.process_group import is_main
from engine.runs.protocols import Entry, Optimizer, TrainOptimizer
from utils.atomic import atomic_directory, write_file
from utils.errors import UserError
from utils.log import warn

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"

# ------------------------------------------------------------------------------------------------------- weights


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Return {name in the state dict: name it is saved under}; tied weights share the first of their names."""
    first: dict[Any, str] = {}
    names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        has_storage = tensor.numel() and not is_dtensor(tensor)
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if has_storage else id(tensor)
        names[name] = first.setdefault(key, name)
    return names


def weights_bytes(model: torch.nn.Module) -> bytes:
    """Return the content of model.safetensors: fp32 (integers unchanged), one copy of tied weights.

    All processes call it for a sharded model, and the main one alone gets the tensors.
    """
    saved = set(canonical_names(model).values())
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in saved:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            tensor = full_tensor(tensor.detach())
            if is_main() or not is_sharded(model):
                tensors[name] = tensor.to("cpu", dtype).contiguous()
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


@torch.no_grad()
def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Copy model.safetensors into the model; UserError names the first tensor that is missing, unknown or misshapen."""
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): use another checkpoint") from None
    source = match_names(path, model, {name: tensor.shape for name, tensor in tensors.items()})
    for name, target in model.state_dict().items():
        target.copy_(shard_like(tensors[source[name]], target))


def restore_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copy the weights of a checkpoint directory, in one file or sharded, into the model; errors as `load_weights`."""
    if (folder / WEIGHTS).is_file():
        return load_weights(model, folder / WEIGHTS)
    from engine.runs.sharded_checkpoint import load_sharded, saved_shapes  # slow to import, and seldom needed

    source = match_names(folder, model, saved_shapes(folder, "model."))
    targets = {f"model.{source[name]}": tensor.detach() for name, tensor in model.state_dict().items()}
    load_sharded(folder, targets, collective=is_sharded(model))


def match_names(path: Path, model: torch.nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, str]:
    """Return {name in the state dict: name in the file}; UserError when the file's `shapes` do not fit the model."""
    targets = model.state_dict()
    names = canonical_names(model)
    unknown = sorted(set(shapes) - set(targets))
    if unknown:
        raise UserError(
            f"{path} holds {unknown[0]}, which this model does not have: the architecture or its file has changed"
        )
    source = {name: name if name in shapes else names[name] for name in targets}
    for name, target in targets.items():
        shape = shapes.get(source[name])
        if shape is None:
            raise UserError(f"{path} lacks {name}: the architecture or its file has changed")
        if shape != target.shape:
            raise UserError(
                f"{path}: {name} is {tuple(shape)} there and {tuple(target.shape)} in this model: "
                "the architecture's fields must stay as they were"
            )
    return source


# ------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: Optimizer | None,
    state: dict[str, Any],
    metadata: dict[str, Any],
    weights: bytes | None = None,
) -> None:
    """Write one checkpoint; OSError when it cannot be written, and then nothing is left of it.

    optimizer: None saves the weights only. state: plain values and tensors, for trainer_state.pt. metadata: further
    keys of the manifest. weights: the content of model.safetensors, when it has been gathered already. The main process
    calls it alone; for a sharded model with its optimizer all processes do, and each writes its shards.
    """
    if optimizer is not None and is_sharded(model):
        from engine.runs.sharded_checkpoint import save_sharded, split_optimizer_state

        optimizer_state, shards = split_optimizer_state(optimizer.state_dict())
        tensors = model.state_dict()
        saved = set(canonical_names(model).values())
        shards |= {f"model.{name}": tensor for name, tensor in tensors.items() if name in saved}
        finish = functools.partial(_write_rest, optimizer_state=optimizer_state, state=state, metadata=metadata)
        return save_sharded(folder, shards, finish)
    with atomic_directory(folder) as directory:
        content = weights or weights_bytes(model)
        entry = write_file(directory / WEIGHTS, lambda file: file.write(content))
        _write_rest(directory, [entry], None if optimizer is None else optimizer.state_dict(), state, metadata)


def _write_rest(
    directory: Path,
    weights: list[Entry],
    optimizer_state: dict[str, Any] | None,
    state: dict[str, Any],
    metadata: dict[str, Any],
) -> None:
    """Write optimizer.pt, trainer_state.pt and, last, the manifest of a directory that has its `weights` files."""
    entries = list(weights)
    if optimizer_state is not None:
        entries.append(
            write_file(directory / "optimizer.pt", lambda file: torch.save(optimizer_state, cast(IO[bytes], file)))
        )
    entries.append(write_file(directory / "trainer_state.pt", lambda file: torch.save(state, cast(IO[bytes], file))))
    manifest = manifest_bytes({**metadata, "files": entries})
    write_file(directory / MANIFEST, lambda file: file.write(manifest))


# ------------------------------------------------------------------------------------------ manifest and verification


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """Return the content of manifest.json, with its own sha256, so that a flipped bit in it is found as well."""
    manifest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode()


def file_sha256(path: Path) -> str:
    """sha256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest, or None when it is missing or not as it was written."""
    try:
        content = (folder / MANIFEST).read_bytes()
        manifest = json.loads(content)
        well_formed = isinstance(manifest, dict) and all(isinstance(entry, dict) for entry in manifest["files"])
        return manifest if well_formed and manifest_bytes(manifest) == content else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def verify_checkpoint(folder: Path, sizes_only: bool = False) -> str | None:
    """Return the damage of a checkpoint directory as a text, or None when every byte is as it was written.

    sizes_only: compare the sizes of the files and do not hash them.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return "it has no readable manifest.json"
    entries = {Path(str(entry.get("name"))).name: entry for entry in manifest["files"]}
    if "trainer_state.pt" not in entries or not weights_entries(manifest):
        return "its manifest.json names no weights"
    try:
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry.get("size") or not (sizes_only or file_sha256(path) == entry.get("sha256")):
                return f"{name} is not as it was written"
    except OSError as error:  # a bad sector
        return f"{name} cannot be read ({error.strerror})"
    return None


def weights_entries(manifest: dict[str, Any]) -> list[Entry]:
    """The entries of a manifest that are weights: one file, or one per process."""
    return [entry for entry in manifest["files"] if str(entry.get("name")).startswith("model")]


def weights_sha256(folder: Path) -> str:
    """The fingerprint of the weights of a valid checkpoint, from its manifest: no file is hashed."""
    manifest = read_manifest(folder)
    assert manifest is not None
    sums = [entry["sha256"] for entry in weights_entries(manifest)]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- finding and restoring


def step_of(folder: Path) -> int:
    """The step of a step checkpoint, from its name."""
    return int(folder.name.removeprefix("step-"))


def find_checkpoints(run: Path) -> list[Path]:
    """List the step checkpoints of a run, newest first, valid or not."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(folders, key=step_of, reverse=True)


def newest_checkpoint(run: Path, final: bool = False) -> Path | None:
    """Return the newest valid checkpoint, or None; damaged ones are named in a warning. `final`: prefer final/."""
    for folder in ([run / "final"] if final and (run / "final").exists() else []) + find_checkpoints(run):
        problem = verify_checkpoint(folder)
        if problem is None:
            return folder
        warn(f"skipping damaged checkpoint {folder}: {problem}")
    return None


def load_training_state(folder: Path, model: torch.nn.Module, optimizer: TrainOptimizer) -> dict[str, Any]:
    """Restore model and optimizer in place from a valid checkpoint, and return the content of trainer_state.pt."""
    if not (folder / "optimizer.pt").is_file():
        raise UserError(f"{folder} has no optimizer state to resume from: give a run folder that has checkpoints/")
    restore_weights(model, folder)
    # to the CPU first: load_state_dict then moves each tensor to the device of its parameter
    try:
        saved = read_plain(folder / "optimizer.pt")
        if is_sharded(model) or not (folder / WEIGHTS).is_file():
            from engine.runs.sharded_checkpoint import merge_optimizer_state

            saved = merge_optimizer_state(saved, optimizer, folder, collective=is_sharded(model))
        optimizer.load_state_dict(saved)
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}/optimizer.pt does not fit this optimizer ({error}): --optimizer and the "
            "architecture must stay as they were"
        ) from None
    return read_plain(folder / "trainer_state.pt")


def read_plain(path: Path) -> dict[str, Any]:
    """Read a dict of plain values and tensors written by torch.save; UserError for anything else, never executed."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read ({first}): use another checkpoint") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no training state: use another checkpoint")
    return value
