"""The trained runs of an output folder: listing them, and loading one for inference, fine-tuning or export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.runs.checkpoint import (
    MANIFEST,
    find_checkpoints,
    newest_checkpoint,
    read_manifest,
    restore_weights,
    verify_checkpoint,
    weights_sha256,
)
from model import get_model_and_args
from model.basemodel import BaseModel
from utils.config import load_yaml, typed_model_values
from utils.errors import UserError
from utils.files import load_json
from utils.tokenizer import Tokenizer, load_tokenizer


@dataclass
class RunInfo:
    """A run folder that has weights, as lists and menus show it; None: not known."""

    path: Path
    stage: str
    model_name: str
    params: int | None
    step: int | None
    val_loss: float | None
    val_bpc: float | None
    modified: float  # seconds since the epoch


@dataclass(frozen=True)
class LoadedRun:
    """A run that is loaded: everything that inference and later stages need to know about it."""

    model: BaseModel  # in eval mode
    tokenizer: Tokenizer
    config: dict[str, Any]  # the run's config.yaml
    path: Path  # the run folder
    checkpoint: Path  # the folder that the weights came from: <path>/final or <path>/checkpoints/step-*
    fingerprint: str  # sha256 of the weights


def load_run(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    overrides: dict[str, Any] | None = None,
) -> LoadedRun:
    """Load the model and the tokenizer of a run folder, or of one checkpoint in it.

    Parameters are cast to `dtype`; buffers keep the type that the model gave them, because a routing bias in bf16 would
    stop moving. `overrides` changes architecture fields that do not affect a shape. UserError: no run folder, no valid
    checkpoint, an unknown field, weights that do not fit the model, another tokenizer.
    """
    run, checkpoint = resolve_checkpoint(Path(path))
    config = load_yaml(run / "config.yaml")
    if not {"stage", "model_name", "model"} <= set(config):
        raise UserError(f"{run}/config.yaml lacks stage, model_name or model: put it back as it was written")
    Model, ModelArgs = get_model_and_args(config["model_name"])
    fields = config["model"] | typed_model_values(overrides or {}, ModelArgs)
    try:
        model = Model(ModelArgs(**fields))
    except TypeError as error:
        raise UserError(f"{run}/config.yaml does not fit {config['model_name']} as it is now: {error}") from None
    restore_weights(model, checkpoint)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    tokenizer = load_tokenizer(run / "tokenizer")
    manifest = read_manifest(checkpoint) or {}
    if manifest.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f"{tokenizer.path} is not the tokenizer that {checkpoint} was trained with: put that one back")
    return LoadedRun(model.to(device).eval(), tokenizer, config, run, checkpoint, weights_sha256(checkpoint))


def resolve_checkpoint(path: Path) -> tuple[Path, Path]:
    """Return (run folder, checkpoint folder) for the path of a run or of one checkpoint in a run.

    The checkpoint of a run is final/ when that is valid, else the newest valid step checkpoint. Each file is hashed
    once. UserError: no run folder, no valid checkpoint.
    """
    if (path / MANIFEST).is_file():
        run = path.parent if path.name == "final" else path.parent.parent
        _require_config(run)
        problem = verify_checkpoint(path)
        if problem is not None:
            raise UserError(f"{path} is damaged, {problem}: choose another checkpoint, or the run itself")
        return run, path
    _require_config(path)
    checkpoint = newest_checkpoint(path, final=True)
    if checkpoint is None:
        raise UserError(f"{path} has no valid checkpoint: let the training reach its first save, or choose another run")
    return path, checkpoint


def _require_config(run: Path) -> None:
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} is no run folder (it has no config.yaml): give the folder that pretrain.py or sft.py made"
        )


def find_runs(
    output_path: str | Path = "output", stage: str | None = None, model_name: str | None = None
) -> list[RunInfo]:
    """List the run folders that have a checkpoint, newest first; reads small files only."""
    runs = []
    for path in (p.parent for p in Path(output_path).glob("*/config.yaml")):
        folders = [f for f in [path / "final", *find_checkpoints(path)] if (f / MANIFEST).is_file()]
        if not folders:
            continue
        manifest = read_manifest(folders[0]) or {}
        summary = _read_summary(path)
        info = RunInfo(
            path,
            manifest.get("stage", path.name.partition("_")[0]),
            manifest.get("model_name", ""),
            manifest.get("params"),
            manifest.get("step"),
            summary.get("val_loss"),
            summary.get("val_bpc"),
            (folders[0] / MANIFEST).stat().st_mtime,
        )
        if stage in (None, info.stage) and model_name in (None, "", info.model_name):
            runs.append(info)
    return sorted(runs, key=lambda info: info.modified, reverse=True)


def newest_run(
    output_path: str | Path = "output", stage: str | None = None, model_name: str | None = None
) -> Path | None:
    """Return the newest run that has a checkpoint, or None."""
    runs = find_runs(output_path, stage, model_name)
    return runs[0].path if runs else None


def _read_summary(run: Path) -> dict[str, Any]:
    try:
        return load_json(run / "summary.json", "")
    except UserError:
        return {}
