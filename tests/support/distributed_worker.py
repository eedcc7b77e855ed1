"""One process of test_distributed.py: trains the tiny model, or a small registered one, on unevenly masked sequences.
Started by torchrun or alone.

Environment variables inject faults in a step (from 1): STOP_AT sends SIGTERM to the first rank, KILL_AT SIGKILL
to the last one unless it has been restarted, NAN_AT spoils the loss of the last one alone, FAIL_AT fills the
disk under it while it writes its shards of a checkpoint. Beyond ROWS_FIT sequences the last one runs out of memory.
"""

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch

from checks.harness.tiny_args import tiny_args
from engine.data.sequences import DocumentSequences
from engine.data.token_file import TokenFile
from engine.distributed import process_group
from engine.runs import sharded_checkpoint
from engine.training.config import TrainConfig
from engine.training.loop import train
from model import get_model_and_args
from tests.support.tiny_model import TinyModel, TinyModelArgs
from utils.atomic import write_file
from utils.config import parse
from utils.errors import run_script
from utils.tokenizer import load_tokenizer


def full_disk(path, _fill):
    write_file(path, lambda file: file.write(b"a beginning"))
    raise OSError(errno.ENOSPC, "No space left on device")


class RankModel(TinyModel):
    """Leaves a layer out of the graph on all ranks but the first, as a plugin with rare branches would."""

    def before_step(self, step, total_steps):
        self.trouble = {name: os.environ.get(name) == str(step + 1) for name in ("STOP_AT", "KILL_AT", "NAN_AT")}
        last = process_group.rank() == process_group.world_size() - 1
        if self.trouble["STOP_AT"] and process_group.is_main():
            os.kill(os.getpid(), signal.SIGTERM)
        if self.trouble["KILL_AT"] and last and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        self.trouble["NAN_AT"] &= last
        if "FAIL_AT" in os.environ and last:
            sharded_checkpoint.write_file = full_disk if os.environ["FAIL_AT"] == str(step + 1) else write_file

    def forward(self, input_ids, targets=None, doc_ids=None):
        last = process_group.rank() == process_group.world_size() - 1
        if last and len(input_ids) > int(os.environ.get("ROWS_FIT", 64)):
            raise torch.OutOfMemoryError
        logits, loss, other_vars = super().forward(input_ids, targets, doc_ids)
        if process_group.is_main() and loss is not None:
            extra = 0.0 * self.unused.sum()
            loss, other_vars = loss + extra, {**other_vars, "loss/extra": other_vars["loss/extra"] + extra}
        if self.training and loss is not None and self.trouble["NAN_AT"]:
            loss = loss * float("nan")
        return logits, loss, other_vars


def main():
    config = parse(TrainConfig)
    folder = Path(config.output_path).parent / "data"
    tokenizer = load_tokenizer(config.tokenizer_path)
    process_group.init("cpu")
    torch.manual_seed(config.seed + process_group.rank())  # every rank starts elsewhere: rank 0's weights must win
    if config.model_name == RankModel.model_name:
        dropout = config.model.get("dropout", 0.0)
        model = RankModel(TinyModelArgs(vocab_size=tokenizer.vocab_size, max_seq_len=32, dropout=float(dropout)))
    else:
        Model, ModelArgs = get_model_and_args(config.model_name)
        args = tiny_args(Model, ModelArgs)[0]
        # a balance loss over all tokens of a micro-batch is no sum over its sequences
        additive = {"aux_loss_weight": 0.0} if hasattr(args, "aux_loss_weight") else {}
        model = Model(replace(args, vocab_size=tokenizer.vocab_size, max_seq_len=32, **additive))
    data = {
        name: DocumentSequences(TokenFile(folder / f"sft_{name}.bin", tokenizer, "make"), 32, pack=True, long="drop")
        for name in ("train", "val")
    }
    train(config, "sft", model, tokenizer, data["train"], data["val"], "python next.py")


if __name__ == "__main__":
    run_script(main)
