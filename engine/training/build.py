"""What a stage needs before training: the model, new or pretrained, and the held-out file."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch

from engine.runs.registry import LoadedRun, load_run, newest_run
from engine.runs.run_folder import source_fingerprint
from engine.training.config import FineTuneConfig, TrainConfig
from model import get_model_and_args, list_models
from model.basemodel import BaseModel
from utils.errors import UserError
from utils.log import log, warn
from utils.tokenizer import Tokenizer


def model_args(name: str) -> type:
    """The args dataclass of an architecture, for the command line."""
    return get_model_and_args(name)[1]


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> BaseModel:
    """A freshly initialised model for the tokenizer's vocabulary, a function of the seed.

    Sets config.max_seq_len to the model's. UserError: no model_name.
    """
    if not config.model_name:
        raise UserError(f"which model? add --model_name=... (there are {', '.join(list_models())})")
    Model, ModelArgs = get_model_and_args(config.model_name)
    fields = {"vocab_size": tokenizer.vocab_size, **config.model}
    if config.max_seq_len:
        fields["max_seq_len"] = config.max_seq_len
    args = ModelArgs(**fields)
    torch.manual_seed(config.seed)
    model = Model(args)
    config.max_seq_len = model.args.max_seq_len  # resolved, for config.yaml
    return model


def pretrained_run(config: FineTuneConfig) -> LoadedRun:
    """The run to start from: config.init_from, else the newest pretraining of config.model_name.

    Sets init_from, model_name and max_seq_len of the config to those of the run. UserError: no such run, another
    model_name, longer sequences than the model takes, architecture fields that do not fit the weights.
    """
    path = config.init_from or newest_run(config.output_path, "pretrain", config.model_name)
    if path is None:
        of = f" of {config.model_name}" if config.model_name else ""
        raise UserError(
            f"no pretraining run{of} in {config.output_path}: run python pretrain.py, or give --init_from=RUN"
        )
    log(f"starting from {path}")
    torch.manual_seed(config.seed)
    run = load_run(path, overrides=config.model)
    model_name = run.config["model_name"]
    if config.model_name not in ("", model_name):
        raise UserError(f"--model_name={config.model_name}, but {path} holds {model_name}: drop one of the two")
    config.init_from = str(path)
    config.model_name = model_name
    longest = run.model.args.max_seq_len
    if config.max_seq_len > longest:
        raise UserError(
            f"--max_seq_len={config.max_seq_len}, but {path} takes at most {longest} tokens: "
            "lower it, or pretrain with a larger --max_seq_len"
        )
    config.max_seq_len = config.max_seq_len or longest
    if run.checkpoint.name != "final" and run.path == Path(path):
        warn(f"{path} has not finished its training: starting from its {run.checkpoint.name}")
    return run


def model_source(model: BaseModel) -> Path:
    """The file that defines the model's class."""
    return Path(inspect.getfile(type(model)))


def model_facts(model: BaseModel) -> dict[str, Any]:
    """What identifies an architecture: its arguments, and the content of its file."""
    return {
        "model": dataclasses.asdict(model.args),
        "model_file": source_fingerprint(model_source(model)),
    }


def val_path(given: str, train_path: str) -> str | None:
    """The held-out file: the one given, else the one next to the training file; None, with a warning, without one."""
    if given:
        return given
    path = Path(train_path)
    neighbour = path.with_name(path.name.replace("_train", "_val"))
    if neighbour == path or not neighbour.is_file() or not neighbour.stat().st_size:
        warn(f"no held-out data next to {train_path}: the held-out loss is not measured")
        return None
    return str(neighbour)
