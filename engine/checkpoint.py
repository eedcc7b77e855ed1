"""Checkpoints that are whole or do not exist, and loading a run for what comes after training.

A checkpoint folder is written to a hidden sibling, every file fsynced, `manifest.json` (name, size, sha256 of each
file) last, then renamed. Nothing that is read can execute code: safetensors, JSON, and `torch.load(weights_only=True)`.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model import get_model_and_args
from utils.config import load_yaml, typed_model_values
from utils.errors import UserError
from utils.log import warn
from utils.tokenizer import load_tokenizer

MANIFEST = "manifest.json"


# ---------------------------------------------------------------------------------------------- one checkpoint folder


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """{name in the state dict: the name its storage is saved under}: tied weights share one entry."""
    first, names = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        names[name] = first.setdefault(key, name)
    return names


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write model.safetensors: fp32 (integers as they are), one copy of tied weights."""
    kept, tensors = set(canonical_names(model).values()), {}
    for name, tensor in model.state_dict().items():
        if name in kept:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            tensors[name] = tensor.detach().to("cpu", dtype).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


@torch.no_grad()
def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Copy model.safetensors into the model; UserError names the first tensor that is missing, unknown or misshapen."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): use another checkpoint") from None
    own, names = model.state_dict(), canonical_names(model)
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise UserError(f"{path} holds {unknown[0]}, which this model has not: "
                        "the architecture or its file has changed")
    for name, target in own.items():
        source = tensors.get(name, tensors.get(names[name]))
        if source is None:
            raise UserError(f"{path} lacks {name}: the architecture or its file has changed")
        if source.shape != target.shape:
            raise UserError(f"{path}: {name} is {tuple(source.shape)} there and {tuple(target.shape)} in this model: "
                            "the architecture's fields must stay as they were")
        target.copy_(source)


def save_checkpoint(folder: Path, model, optimizer, state: dict, about: dict) -> None:
    """Write one checkpoint (main process only); OSError when it cannot be written, and then nothing is left behind.

    state: plain numbers and tensors. about: goes into the manifest.
    """
    temporary = folder.parent / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that died while saving
    temporary.mkdir(parents=True)
    try:
        save_weights(model, temporary / "model.safetensors")
        if optimizer is not None:
            torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        torch.save(state, temporary / "trainer_state.pt")
        files = [{"name": path.name, "size": path.stat().st_size, "sha256": file_sha256(path)}
                 for path in sorted(temporary.iterdir())]
        (temporary / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=1), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _fsync(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
        _fsync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (SafetensorError, RuntimeError)):  # how safetensors and torch.save report a full disk
            raise OSError(str(error)) from error
        raise


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict | None:
    """The manifest, or None when there is no readable one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), list) else None
    except (OSError, ValueError):
        return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every byte is as it was written."""
    manifest = read_manifest(folder)
    if manifest is None:
        return "it has no readable manifest.json"
    names = {entry.get("name") for entry in manifest["files"]}
    if not {"model.safetensors", "trainer_state.pt"} <= names:
        return "its manifest.json names no weights"
    for entry in manifest["files"]:
        path = folder / Path(str(entry.get("name"))).name
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != entry.get("size") or file_sha256(path) != entry.get("sha256"):
            return f"{path.name} is not as it was written"
    return None


def find_checkpoints(run: Path) -> list[Path]:
    """Step checkpoints of a run, newest first, valid or not."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def newest_checkpoint(run: Path, final: bool = False) -> Path | None:
    """The newest valid checkpoint; damaged ones are named and skipped. `final`: prefer the run's final weights."""
    for folder in ([run / "final"] if final and (run / "final").exists() else []) + find_checkpoints(run):
        problem = damage(folder)
        if problem is None:
            return folder
        warn(f"skipping damaged checkpoint {folder}: {problem}")
    return None


def prune_checkpoints(run: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` step checkpoints."""
    for folder in find_checkpoints(run)[keep_last:]:
        shutil.rmtree(folder, ignore_errors=True)


def load_training_state(folder: Path, model, optimizer) -> dict:
    """Restore model and optimizer in place and return the trainer's state, from a checkpoint found valid."""
    if not (folder / "optimizer.pt").is_file():
        raise UserError(f"{folder} has no optimizer state to go on from: give a run folder that has checkpoints/")
    load_weights(model, folder / "model.safetensors")
    # to the cpu first: load_state_dict then puts each tensor beside its parameter
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    return torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)


# ------------------------------------------------------------------------------------------------------- whole runs


@dataclass
class RunInfo:
    """A run folder that has weights, as lists and menus show it; figures are None until they are known."""

    path: Path
    stage: str
    model_name: str
    params: int | None
    step: int | None
    val_loss: float | None
    val_bpc: float | None
    modified: float  # seconds since the epoch


def load_run(path, device="cpu", dtype=torch.float32, overrides: dict | None = None):
    """Return (model in eval mode, tokenizer, config dict) of a run folder.

    Takes final/ when it is valid, else the newest valid checkpoint. Parameters get `dtype`; buffers keep the type the
    model gave them, for a routing bias in bf16 would stop moving. `overrides` changes architecture fields that leave
    the shapes alone. UserError: no run folder, no valid checkpoint, unknown field, weights that do not fit.
    """
    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is no run folder (it has no config.yaml): "
                        "give the folder that pretrain.py or sft.py made")
    config = load_yaml(path / "config.yaml")
    checkpoint = newest_checkpoint(path, final=True)
    if checkpoint is None:
        raise UserError(f"{path} has no valid checkpoint: let the training reach its first save, or choose another run")
    if not {"stage", "model_name", "model"} <= set(config):
        raise UserError(f"{path}/config.yaml does not say stage, model_name and model: put it back as it was written")
    Model, ModelArgs = get_model_and_args(config["model_name"])
    overrides = typed_model_values(overrides or {}, ModelArgs)
    try:
        model = Model(ModelArgs(**(config["model"] | overrides)))
    except TypeError as error:
        raise UserError(f"{path}/config.yaml does not fit {config['model_name']} as it is now: {error}") from None
    load_weights(model, checkpoint / "model.safetensors")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    tokenizer = load_tokenizer(path / "tokenizer")
    if read_manifest(checkpoint).get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f"{tokenizer.path} is not the tokenizer that {checkpoint} was trained with: put that one back")
    return model.to(device).eval(), tokenizer, config


def find_runs(output_path="output", stage: str | None = None, model_name: str | None = None) -> list[RunInfo]:
    """Run folders that have a checkpoint, newest first; reads small files only."""
    runs = []
    for path in (p.parent for p in Path(output_path).glob("*/config.yaml")):
        folders = [f for f in [path / "final", *find_checkpoints(path)] if (f / MANIFEST).is_file()]
        if not folders:
            continue
        about, summary = read_manifest(folders[0]) or {}, _read_json(path / "summary.json")
        info = RunInfo(path, about.get("stage", path.name.partition("_")[0]), about.get("model_name", ""),
                       about.get("params"), about.get("step"), summary.get("val_loss"), summary.get("val_bpc"),
                       (folders[0] / MANIFEST).stat().st_mtime)
        if stage in (None, info.stage) and model_name in (None, "", info.model_name):
            runs.append(info)
    return sorted(runs, key=lambda info: info.modified, reverse=True)


def newest_run(output_path="output", stage: str | None = None, model_name: str | None = None) -> Path | None:
    """The newest run that has a checkpoint, or None."""
    runs = find_runs(output_path, stage, model_name)
    return runs[0].path if runs else None


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
