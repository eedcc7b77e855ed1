"""A run folder to a folder that transformers loads, and a published checkpoint to a run folder."""

import dataclasses
import json
import os
import platform
import shlex
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from engine.interchange.hf_checkpoint import Grown, Weights, architecture_for, read_json
from engine.interchange.model_card import model_card
from engine.interchange.tokenizers import adopt_tokenizer
from engine.runs.checkpoint import save_checkpoint
from engine.runs.registry import load_run
from engine.runs.run_folder import git_revision
from model import model_file
from utils.errors import UserError
from utils.log import format_count, log
from utils.tokenizer import load_tokenizer, side_files


def export_hf(run: Path, folder: Path) -> None:
    """Write the newest weights of a run as transformers has them.

    UserError: no such run, a folder that exists. ModelError: an architecture without a published layout.
    """
    with atomic_directory(folder) as place:
        loaded = load_run(run)
        model, tokenizer, settings = loaded.model, loaded.tokenizer, loaded.config
        config, tensors = model.to_hf()
        stage = settings.get("stage", "pretrain")
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        config |= ids | {"mini_llm": {"model_name": settings["model_name"], "stage": stage}}
        generation = ids | {"eos_token_id": [tokenizer.eos_id, tokenizer.im_end_id]}
        write_json(place / "config.json", config)
        write_json(place / "generation_config.json", generation)
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(place)
        for name, text in side_files().items():
            if not (place / name).is_file():
                (place / name).write_text(text, encoding="utf-8")
        summary = read_json(Path(run) / "summary.json") if (Path(run) / "summary.json").is_file() else {}
        (place / "README.md").write_text(model_card(folder.name, stage, model, config, summary), encoding="utf-8")
    log(f"{run} is now in {folder}: {len(tensors)} tensors, {format_count(model.num_params()['total'])} parameters")


def import_hf(source: Path, run: Path, max_seq_len: int = 0) -> None:
    """Make a run folder from a published checkpoint; `max_seq_len` above 0 shortens what the model is built for.

    UserError or ModelError: no such checkpoint, an architecture nobody reads, a tensor without a place.
    """
    config = read_json(source / "config.json")
    name, Model = architecture_for(config)
    stage = (config.get("mini_llm") or {}).get("stage", "pretrain")  # of others nobody knows: it goes on from a text
    if max_seq_len:
        config["max_position_embeddings"] = min(max_seq_len, config.get("max_position_embeddings", max_seq_len))
    with atomic_directory(run) as place:
        weights, had = Weights(source), config.get("vocab_size", 0)
        needed = adopt_tokenizer(source, place / "tokenizer", config)
        if needed > had:
            config["vocab_size"] = needed
            weights = Grown(weights, Model.hf_layout.vocab_names(config), needed)
            log(f"{needed - had} special tokens are new: their embeddings start as the mean of all")
        model = Model.from_hf(config, weights)
        write_run(place, model, name, stage, source)
    counts = model.num_params()
    log(f"{source} is now the run {run}: {name}, {format_count(counts['total'])} parameters")
    log(f"Next: python test.py --run={run}, or python sft.py --init_from={run}")


def write_run(place: Path, model, name: str, stage: str, source: Path) -> None:
    """The files of a run folder that later stages need, around weights that come from elsewhere."""
    counts = model.num_params()
    settings = {
        "stage": stage,
        "model_name": name,
        "max_seq_len": model.args.max_seq_len,
        "model": dataclasses.asdict(model.args),
    }
    (place / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    about = {
        "stage": stage,
        "model_name": name,
        "params": counts,
        "imported_from": str(source.resolve()),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "git_revision": git_revision(),
    }
    write_json(place / "run.json", about)
    write_json(place / "summary.json", {"stage": stage, "model_name": name, "status": "imported", "params": counts})
    shutil.copyfile(model_file(name), place / model_file(name).name)
    save_checkpoint(
        place / "final",
        model,
        None,
        {"step": 0},
        {
            "stage": stage,
            "model_name": name,
            "params": counts["total"],
            "step": 0,
            "tokens": 0,
            "tokenizer": load_tokenizer(place / "tokenizer").fingerprint,
        },
    )


@contextmanager
def atomic_directory(target: Path):
    """A folder to fill beside `target`, which gets its name at the end, or leaves nothing when something fails."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists: give a new folder, or remove it")
    place = target.absolute().with_name(f".{target.name}.tmp")
    shutil.rmtree(place, ignore_errors=True)
    try:
        place.mkdir(parents=True)
        yield place
        if target.is_dir():
            target.rmdir()
        os.replace(place, target)
    except OSError as error:
        raise UserError(f"{target} could not be written ({error}): make room, or give another folder") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
