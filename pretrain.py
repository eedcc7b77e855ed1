"""Pretraining: a model learns to continue text.

python pretrain.py --model_name=MODEL --max_batch_size=18
torchrun --nproc_per_node=2 pretrain.py --config configs/x.yaml --max_steps=1000
"""

from dataclasses import dataclass

from checks.harness.runner import refuse_unless_right
from engine.data.sequences import DocumentRows, TokenFile, WindowRows
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

    pretrain_data_path: str = opt("output/data/pretrain_train.bin", "training tokens", neutral=True, path=True)
    pretrain_val_path: str = opt(
        "", "held-out tokens; default: beside the training tokens, `_val` for `_train`", neutral=True, path=True
    )
    rows: str = opt(
        "windows",
        "how documents become rows: cut at every max_seq_len tokens, or kept whole and packed",
        choices=("windows", "documents"),
    )
    skip_checks: bool = opt(
        False, "train even if the architecture fails the quick checks of check_model.py", neutral=True
    )


def main(argv=None) -> dict:
    config = parse(PretrainConfig, argv, model_args)
    process_group.init(config.device)
    tokenizer = load_tokenizer(config.tokenizer_path)
    model = build_model(config, tokenizer)
    seq_len, packs = model.args.max_seq_len, model.accepts("doc_ids")

    train_file = TokenFile(config.pretrain_data_path, tokenizer, MAKE_DATA, "pretrain")
    windows = packs and config.rows == "windows"
    train_rows = WindowRows(train_file, seq_len) if windows else DocumentRows(train_file, seq_len, packs)
    if not windows:
        log(train_rows.summary())
    held_out = val_path(config.pretrain_val_path, config.pretrain_data_path)
    val_file = TokenFile(held_out, tokenizer, MAKE_DATA, "pretrain") if held_out else None
    val_rows = DocumentRows(val_file, seq_len, packs) if val_file else None

    if not config.skip_checks:  # on the processor, a few seconds: less than a training run on a mask that leaks
        refuse_unless_right(config.model_name, {k: v for k, v in config.model.items() if isinstance(v, (bool, str))})
    return train(
        config, "pretrain", model, tokenizer, train_rows, val_rows, next_command="python sft.py --init_from={run}"
    )


if __name__ == "__main__":
    run_script(main)
