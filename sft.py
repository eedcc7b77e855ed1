"""Supervised fine-tuning: a pretrained model learns to answer.

python sft.py --model_name=MODEL
torchrun --nproc_per_node=2 sft.py --init_from=output/pretrain_MODEL
"""

from dataclasses import dataclass

from engine.data.sequences import DocumentRows, TokenFile
from engine.distributed import process_group
from engine.training.build import model_args, pretrained_model, val_path
from engine.training.config import TrainConfig
from engine.training.loop import train
from utils.config import opt, parse
from utils.errors import run_script
from utils.log import log

MAKE_DATA = "cd preprocess_data && python preprocess_data.py sft"


@dataclass
class SFTConfig(TrainConfig):
    """Supervised fine-tuning: a pretrained model learns to answer."""

    init_from: str = opt(
        "", "run folder of the pretrained model; default: the newest of --model_name", neutral=True, path=True
    )
    sft_data_path: str = opt("output/data/sft_train.bin", "training conversations", neutral=True, path=True)
    sft_val_path: str = opt(
        "", "held-out conversations; default: beside the training ones, `_val` for `_train`", neutral=True, path=True
    )
    long_rows: str = opt(
        "drop",
        "conversations longer than max_seq_len: left out, cut off there, or no training",
        choices=("drop", "cut", "error"),
    )
    max_lr: float = opt(0.002, "peak learning rate")


def main(argv=None) -> dict:
    config = parse(SFTConfig, argv, model_args)
    process_group.init(config.device)
    model, tokenizer, seq_len, weights = pretrained_model(config)

    def conversations(path):
        file = TokenFile(path, tokenizer, MAKE_DATA, "sft")
        rows = DocumentRows(file, seq_len, model.accepts("doc_ids"), config.long_rows)
        log(rows.summary())
        return rows

    train_rows = conversations(config.sft_data_path)
    held_out = val_path(config.sft_val_path, config.sft_data_path)
    val_rows = conversations(held_out) if held_out else None

    return train(
        config,
        "sft",
        model,
        tokenizer,
        train_rows,
        val_rows,
        next_command="python test.py --run={run}",
        facts={"init_weights": weights},
    )


if __name__ == "__main__":
    run_script(main)
