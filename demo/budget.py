"""Prints the minutes that a training stage of the demo may take: `python demo/budget.py TIMES pretrain|sft MODEL`.

Everything after the downloads ends within 20 minutes. What the stages before took, in this call or an earlier one, is
in the file TIMES (demo/times.py). The evaluation needs some minutes on a slow machine; pretraining gets most of the
rest, and fine-tuning what pretraining has left.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.times import read

LIMIT = 20 * 60  # seconds
AIM = 0.95  # of the limit: a stage may take longer than the stages before suggest
BEFORE = ("chat", "tokenizer", "tokens", "chat-tokens")  # the stages between the downloads and pretraining
FINE_TUNING = 0.2  # of the time for training
EVALUATION = 2.5  # times the training of the tokenizer, which was measured on this machine
LEAST_EVALUATION = 60.0  # seconds
MOST_EVALUATION = 300.0
LEAST_TRAINING = 120.0  # seconds: on a machine so slow that the limit cannot be kept


def seconds(stage: str, times: dict[str, int], model: str) -> float:
    """Return the seconds for pretraining ("pretrain") or fine-tuning ("sft"); times: of the stages before, by name."""
    spent = sum(times.get(name, 0) for name in BEFORE)
    evaluation = min(MOST_EVALUATION, max(LEAST_EVALUATION, EVALUATION * times.get("tokenizer", 0)))
    training = AIM * LIMIT - spent - evaluation
    pretraining = (1 - FINE_TUNING) * training
    if stage == "sft":
        left = training - times.get(f"pretrain {model}", pretraining)
        # pretraining that was interrupted counts its last part alone, and one that has seen enough ends early
        return max(LEAST_TRAINING, min(left, training - 0.9 * pretraining))
    return max(LEAST_TRAINING, pretraining)


if __name__ == "__main__":
    file, wanted, name = sys.argv[1:]
    print(f"{seconds(wanted, read(Path(file)), name) / 60:.2f}")
