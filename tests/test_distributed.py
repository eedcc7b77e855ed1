"""Two processes (torchrun, gloo) give what one gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_helpers import make_tokenizer, sft_files
from safetensors.torch import load_file

from engine import distributed
from engine.metrics import read_metrics
from utils.errors import UserError

WORKER = Path(__file__).parent / "distributed_worker.py"


def train(folder: Path, processes: int, output="output", **settings):
    """Run the worker; returns (metrics, final weights or None)."""
    settings = {"model_name": "tiny", "device": "cpu", "global_batch_size": 8, "max_batch_size": 4, "max_steps": 8,
                "log_interval": 1, "eval_interval": 4, "sample_interval": 0, "max_lr": 0.01,
                "output_path": folder / output,
                "tokenizer_path": folder / "tokenizer", **settings}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    launch = [sys.executable, str(WORKER)] if processes == 1 else \
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(WORKER)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch + flags, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / output / "sft_tiny"
    return read_metrics(run / "metrics.jsonl"), load_file(run / "final/model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    sft_files(path / "data", make_tokenizer(path / "tokenizer"))
    return path


def test_two_processes_give_the_same_curve(folder):
    one, weights = train(folder, 1, "one", max_batch_size=4)
    two, theirs = train(folder, 2, "two", max_batch_size=4)
    assert [r["step"] for r in one] == [r["step"] for r in two] and len(one) == 10  # 8 steps, 2 evaluations
    for ours, other in zip(one, two):
        for key in ("loss", "grad_norm", "val_loss", "val_bpc"):
            if key in ours:
                assert other[key] == pytest.approx(ours[key], rel=1e-5), (ours["step"], key)
        assert ours["tokens"] == other["tokens"]
    for name, value in weights.items():
        assert (value - theirs[name]).abs().max() < 1e-4, name
    assert (weights["bias"] == theirs["bias"]).all()


def test_the_number_of_processes_may_change_on_resume(folder):
    for processes, steps in ((1, 2), (2, 4), (1, 6)):
        # the same folder, a longer run each time: --resume=PATH allows it
        path = folder / "changing" / "sft_tiny"
        changed, _ = train(folder, processes, "changing", max_steps=steps, lr_schedule="constant", warmup_iters=1,
                           **({"resume": path} if path.exists() else {}))
    steady, _ = train(folder, 1, "steady", max_steps=6, lr_schedule="constant", warmup_iters=1)
    ours, theirs = ([r["loss"] for r in records if "loss" in r] for records in (changed, steady))
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == 6


def test_devices(monkeypatch):
    assert distributed.find_device("cpu").type == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--device=cuda, but PyTorch sees no CUDA device"):
        distributed.find_device("cuda")
