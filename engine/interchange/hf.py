"""Export a run folder to a folder that transformers loads, and import a published checkpoint as a run folder."""

import dataclasses
import json
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.interchange.hf_checkpoint import (
    ExtendedWeights,
    Weights,
    architecture_for,
    read_json,
    save_weights,
    written_here,
)
from engine.interchange.model_card import model_card
from engine.interchange.tokenizers import read_tokenizer, restore_tokenizer, write_tokenizer
from engine.runs.checkpoint import save_checkpoint
from engine.runs.registry import load_run
from engine.runs.run_folder import git_revision
from model import model_file
from model.basemodel import BaseModel
from utils.atomic import atomic_directory, copy_file, sync_files, write_text
from utils.errors import UserError
from utils.log import format_count, log
from utils.tokenizer import load_tokenizer
from utils.version import VERSION

BASE = "pretrain"  # the stage of a model that has seen no conversation


def export_hf(run: Path, folder: Path) -> None:
    """Write the newest weights of a run in the layout of transformers.

    UserError: no such run, a folder that exists. ModelError: an architecture without a published layout.
    """
    require_new(folder)
    loaded = load_run(run)
    model = loaded.model
    tokenizer = loaded.tokenizer
    stage = loaded.config.get("stage", "pretrain")
    config, tensors = model.to_hf()
    if stage != BASE and not tokenizer.is_byte_level:
        raise UserError(
            f"{run} is a chat model whose tokenizer is not byte-level: AutoTokenizer would encode its chats otherwise; "
            "export the base model, or train with a byte-level tokenizer"
        )
    ids = {f"{role}_token_id": tokenizer.role_id(role) for role in ("bos", "eos", "pad")}
    config |= ids | {"mini_llm": {"model_name": loaded.config["model_name"], "stage": stage}}
    ends = tokenizer.end_ids if stage == BASE else tokenizer.stop_ids
    generation = ids | {"eos_token_id": sorted(ends) or None}
    summary = read_json(Path(run) / "summary.json") if (Path(run) / "summary.json").is_file() else {}
    with new_directory(folder) as directory:
        write_tokenizer(tokenizer, directory)
        write_text(directory / "config.json", to_json(config))
        write_text(directory / "generation_config.json", to_json(generation))
        save_weights(tensors, directory)
        write_text(directory / "README.md", model_card(folder.name, stage, model, config, summary))
    log(f"{run} is now in {folder}: {len(tensors)} tensors, {format_count(model.num_params()['total'])} parameters")


def import_hf(source: Path, run: Path, max_seq_len: int = 0) -> None:
    """Make a run folder from a published checkpoint; `max_seq_len` above 0 shortens what the model is built for.

    UserError or ModelError: no such checkpoint, an architecture without a model here, a tensor that does not fit.
    """
    require_new(run)
    config = read_json(source / "config.json")
    name, Model = architecture_for(config)
    assert Model.hf_layout is not None
    layout = Model.hf_layout.for_config(config)
    # a checkpoint of others counts as a base model: it has not been trained on our chat template
    stage = str(written_here(config).get("stage", BASE))
    tokenizer = read_tokenizer(source, config)
    weights: Mapping[str, torch.Tensor] = layout.checkpoint(Weights(source))
    config = layout.in_our_keys(config, weights)
    args = layout.model_args(config)
    new_rows = tokenizer.vocab_size - args.vocab_size
    if new_rows > 0:
        config = {**config, "vocab_size": tokenizer.vocab_size}
        with torch.device("meta"):
            names = layout.vocab_names(Model(args))
        weights = ExtendedWeights(weights, names, args.vocab_size, new_rows)
        log(f"{new_rows} tokens are new: their embeddings start as the mean of all")
    left_out = layout.left_out(weights)
    if left_out:
        log(f"{len(left_out)} tensors of the checkpoint are left out, such as {left_out[0]}")
    model = Model.from_hf(config, weights, max_seq_len)
    with new_directory(run) as directory:
        restore_tokenizer(tokenizer, directory / "tokenizer")
        write_imported_run(directory, model, name, stage, source)
    counts = model.num_params()
    log(f"{source} is now the run {run}: {name}, {format_count(counts['total'])} parameters")
    log(f"Next: python test.py --run={run}, or python sft.py --init_from={run}")


def write_imported_run(directory: Path, model: BaseModel, name: str, stage: str, source: Path) -> None:
    """Write the files of a run folder that later stages need, for weights that come from elsewhere."""
    counts = model.num_params()
    settings = {
        "stage": stage,
        "model_name": name,
        "max_seq_len": model.args.max_seq_len,
        "model": dataclasses.asdict(model.args),
    }
    write_text(directory / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    about = {
        "version": VERSION,
        "stage": stage,
        "model_name": name,
        "params": counts,
        "imported_from": str(source.resolve()),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "git_revision": git_revision(),
    }
    summary = {"stage": stage, "model_name": name, "status": "imported", "params": counts}
    write_text(directory / "run.json", to_json(about))
    write_text(directory / "summary.json", to_json(summary))
    copy_file(model_file(name), directory / model_file(name).name)
    metadata = {
        "stage": stage,
        "model_name": name,
        "params": counts["total"],
        "step": 0,
        "tokens": 0,
        "tokenizer": load_tokenizer(directory / "tokenizer").fingerprint,
    }
    save_checkpoint(directory / "final", model, None, {"step": 0}, metadata)


def require_new(target: Path) -> None:
    """Raise UserError for a folder that exists and is not empty, before anything is read."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists: give a new folder, or remove it")


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a hidden directory to fill, which becomes `target` when the block ends, or is removed after an error.

    UserError: `target` cannot be written.
    """
    try:
        with atomic_directory(target.absolute()) as directory:
            yield directory
            sync_files(directory)
    except OSError as error:
        raise UserError(f"{target} could not be written ({error}): make room, or give another folder") from None


def to_json(value: Any) -> str:
    """The text of a JSON file as transformers writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
