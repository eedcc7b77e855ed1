"""A new file in model/, and nothing else touched, goes through every stage: the promise of the project."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.paths import ROOT

# A running mean over the past: neither `state` nor `doc_ids`, and a figure of its own for TensorBoard.
PLUGIN = """
from dataclasses import dataclass

import torch
from torch import nn

from .basemodel import BaseModel, BaseModelArgs
from .layers import RMSNorm, lm_loss


@dataclass
class RunningMeanModelArgs(BaseModelArgs):
    width: int = 48
    max_seq_len: int = 64


class RunningMeanModel(BaseModel):
    model_name = "mini_running_mean"

    def __init__(self, args):
        super().__init__(args)
        self.embed = nn.Embedding(args.vocab_size, args.width)
        self.layers = nn.ModuleList(nn.Linear(2 * args.width, args.width) for _ in range(2))
        self.norm = RMSNorm(args.width)
        self.lm_head = nn.Linear(args.width, args.vocab_size, bias=False)
        self.init_weights()

    def forward(self, input_ids, targets=None):
        x = self.embed(input_ids)
        seen = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        for layer in self.layers:
            x = x + layer(torch.cat((x, x.cumsum(dim=1) / seen), dim=-1)).tanh()
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x), None, {}
        loss = lm_loss(x, self.lm_head.weight, targets)
        return None, loss, {"loss/ce": loss, "mean/of_squares": x.detach().square().mean()}
"""

TRAINING = ["--model_name=mini_running_mean", "--device=cpu", "--max_steps=4", "--max_batch_size=4", "--log_interval=1"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the project with one more file, and two small corpora of a user's own."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    hidden = shutil.ignore_patterns(".git", ".venv", "output", "tests", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=hidden)
    (folder / "model/running_mean.py").write_text(PLUGIN, encoding="utf-8")
    random_ = random.Random(0)
    lines = ["".join(random_.choices("春花秋月何时了往事知多少", k=14)) + "。" for _ in range(400)]
    chats = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in zip(lines, reversed(lines))
    ]
    with open(folder / "mine.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines)
    with open(folder / "chats.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
    return folder


def run(clone, *command):
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def tags(clone, run_folder):
    events = EventAccumulator(str(clone / "output" / run_folder / "logs"))
    events.Reload()
    return set(events.Tags()["scalars"])


@pytest.mark.slow
def test_one_new_file_goes_through_every_stage(clone):
    run(clone, "train_tokenizer.py", "--sources=mine.jsonl", "--vocab_size=300")
    run(clone, "preprocess_data/preprocess_data.py", "pretrain", "--sources=mine.jsonl", "--workers=1")
    run(clone, "preprocess_data/preprocess_data.py", "sft", "--sources=chats.jsonl", "--workers=1")
    run(clone, "pretrain.py", *TRAINING)
    run(clone, "sft.py", *TRAINING)
    for stage in ("pretrain", "sft"):
        folder = f"{stage}_mini_running_mean"
        summary = json.loads((clone / "output" / folder / "summary.json").read_text(encoding="utf-8"))
        assert summary["status"] == "finished" and summary["steps"] == 4 and summary["val_loss"] > 0
        assert (clone / "output" / folder / "running_mean.py").read_text(encoding="utf-8") == PLUGIN
        assert any("mean/of_squares" in tag for tag in tags(clone, folder))
        assert any("loss/ce" in tag for tag in tags(clone, folder))
    answer = run(clone, "test.py", "--prompt=春花", "--max_new_tokens=8", "--temperature=0")
    assert answer.strip()  # the newest fine-tuned run, found without being named
    assert "mini_running_mean" in run(clone, "-c", "from model import list_models; print(list_models())")
