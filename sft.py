"""Supervised fine-tuning: a pretrained model learns to answer.

python sft.py --model_name=MODEL
torchrun --nproc_per_node=2 sft.py --init_from=output/pretrain_MODEL
"""

from dataclasses import dataclass
from typing import Any

import utils.openmp  # noqa: F401  before PyTorch is loaded
from engine.data.sequences import DocumentSequences
from engine.data.token_file import TokenFile
from engine.distributed import process_group
from engine.training.build import model_args, pretrained_run, val_path
from engine.training.config import FineTuneConfig
from engine.training.loop import train
from utils.config import opt, parse
from utils.errors import run_script
from utils.log import log

MAKE_DATA = "cd preprocess_data && python preprocess_data.py sft"


@dataclass
class SFTConfig(FineTuneConfig):
    """Supervised fine-tuning: a pretrained model learns to answer."""

    sft_data_path: str = opt("output/data/sft_train.bin", "training conversations", neutral=True, path=True)
    sft_val_path: str = opt(
        "", "held-out conversations; default: next to the training ones, `_val` for `_train`", neutral=True, path=True
    )
    long_rows: str = opt(
        "drop",
        "conversations longer than max_seq_len: drop them, cut them, or stop with an error",
        choices=("drop", "cut", "error"),
    )
    max_lr: float = opt(0.002, "peak learning rate", ge=0)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config = parse(SFTConfig, argv, model_args)
    process_group.init(config.device)
    run = pretrained_run(config)

    def conversations(path: str) -> DocumentSequences:
        file = TokenFile(path, run.tokenizer, MAKE_DATA, "sft")
        data = DocumentSequences(file, config.max_seq_len, run.model.accepts("doc_ids"), config.long_rows)
        log(data.summary())
        return data

    train_data = conversations(config.sft_data_path)
    held_out = val_path(config.sft_val_path, config.sft_data_path)
    val_data = conversations(held_out) if held_out else None

    return train(
        config,
        "sft",
        run.model,
        run.tokenizer,
        train_data,
        val_data,
        next_command="python test.py --run={run}",
        facts={"init_weights": run.fingerprint},
    )


if __name__ == "__main__":
    run_script(main)
