"""Pretraining: a model learns to continue text.

python pretrain.py --model_name=MODEL --max_batch_size=18
torchrun --nproc_per_node=2 pretrain.py --config configs/x.yaml --max_steps=1000
"""

from dataclasses import dataclass
from typing import Any

import utils.openmp  # noqa: F401  before PyTorch is loaded
from checks.harness.runner import refuse_unless_right
from engine.data.sequences import DocumentSequences, Sequences, WindowSequences
from engine.data.token_file import TokenFile
from engine.distributed import process_group
from engine.training.build import build_model, model_args, val_path
from engine.training.config import TrainConfig
from engine.training.loop import train
from utils.config import opt, parse
from utils.errors import run_script
from utils.log import log
from utils.tokenizer import load_tokenizer

MAKE_DATA = "cd preprocess_data && python preprocess_data.py pretrain"


@dataclass
class PretrainConfig(TrainConfig):
    """Pretraining: a model learns to continue text."""

    pretrain_data_path: str = opt(
        "output/data/pretrain_train.bin", "training tokens", neutral=True, path=True, group="Data"
    )
    pretrain_val_path: str = opt(
        "", "held-out tokens; default: next to the training tokens, `_val` for `_train`", neutral=True, path=True
    )
    rows: str = opt(
        "windows",
        "how documents become sequences: cut at every max_seq_len tokens, or unsplit and packed",
        choices=("windows", "documents"),
    )
    skip_checks: bool = opt(
        False, "train even if the architecture fails the quick checks of check_model.py", neutral=True
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config = parse(PretrainConfig, argv, model_args)
    process_group.init(config.device)
    tokenizer = load_tokenizer(config.tokenizer_path)
    model = build_model(config, tokenizer)
    seq_len = model.args.max_seq_len
    packs = model.accepts("doc_ids")

    train_file = TokenFile(config.pretrain_data_path, tokenizer, MAKE_DATA, "pretrain")
    train_data: Sequences
    if packs and config.rows == "windows":
        train_data = WindowSequences(train_file, seq_len)
    else:
        train_data = DocumentSequences(train_file, seq_len, packs)
        log(train_data.summary())
    held_out = val_path(config.pretrain_val_path, config.pretrain_data_path)
    val_file = TokenFile(held_out, tokenizer, MAKE_DATA, "pretrain") if held_out else None
    val_data = DocumentSequences(val_file, seq_len, packs) if val_file else None

    if not config.skip_checks:  # a few seconds on the CPU: less than a training run with a leaking mask
        refuse_unless_right(config.model_name, {k: v for k, v in config.model.items() if isinstance(v, (bool, str))})
    return train(
        config, "pretrain", model, tokenizer, train_data, val_data, next_command="python sft.py --init_from={run}"
    )


if __name__ == "__main__":
    run_script(main)
