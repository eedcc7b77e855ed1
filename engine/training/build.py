"""What a stage needs before its training: the model, new or from an earlier run, and the held-out file."""

from pathlib import Path

import torch

from engine.runs.registry import load_run, newest_run
from model import get_model_and_args, list_models
from utils.errors import UserError
from utils.log import log, warn


def model_args(name: str):
    """The args dataclass of an architecture, for the command line."""
    return get_model_and_args(name)[1]


def build_model(config, tokenizer):
    """A freshly initialised model for the tokenizer's vocabulary, the same for the same seed."""
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


def pretrained_model(config):
    """Return (model, tokenizer, tokens a row, sha256 of the weights) of --init_from: default, the newest pretraining.

    Sets config.model_name and config.max_seq_len to what they turn out to be. UserError: no such run, another
    model_name, rows longer than the model takes, architecture fields that do not fit the weights.
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
    theirs = run.config["model_name"]
    if config.model_name not in ("", theirs):
        raise UserError(f"--model_name={config.model_name}, but {path} holds {theirs}: drop one of the two")
    config.model_name, config.init_from = theirs, str(path)
    seq_len = config.max_seq_len or run.model.args.max_seq_len
    if seq_len > run.model.args.max_seq_len:
        raise UserError(
            f"--max_seq_len={seq_len}, but {path} takes at most {run.model.args.max_seq_len} tokens: "
            "lower it, or pretrain with a larger --max_seq_len"
        )
    config.max_seq_len = seq_len
    if run.checkpoint.name != "final" and run.path == Path(path):
        warn(f"{path} has not finished its training: starting from its {run.checkpoint.name}")
    return run.model, run.tokenizer, seq_len, run.fingerprint


def val_path(given: str, train_path: str) -> str | None:
    """The held-out file: the one given, else the training file's neighbour; None, with a warning, without one."""
    if given:
        return given
    path = Path(train_path)
    neighbour = path.with_name(path.name.replace("_train", "_val"))
    if neighbour == path or not neighbour.is_file() or not neighbour.stat().st_size:
        warn(f"no held-out data beside {train_path}: the held-out loss is not measured")
        return None
    return str(neighbour)
