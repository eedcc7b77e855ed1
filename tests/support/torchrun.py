"""Runs distributed_worker.py in one or more processes, and reads what it leaves."""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from engine.runs.metrics import read_metrics
from tests.support.make_tokenizer import make_tokenizer
from tests.support.paths import ROOT
from tests.support.token_files import sft_files

WORKER = "tests.support.distributed_worker"


def train(folder: Path, processes: int, output="output", trouble=None, restarts=0, **settings):
    """Run the worker, its environment with `trouble`; returns (metrics, final weights or None, its output)."""
    settings = {
        "model_name": "tiny",
        "device": "cpu",
        "global_batch_size": 8,
        "max_batch_size": 4,
        "max_steps": 8,
        "log_interval": 1,
        "eval_interval": 4,
        "sample_interval": 0,
        "max_lr": 0.01,
        "output_path": folder / output,
        "tokenizer_path": folder / "tokenizer",
        **settings,
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    torchrun = [
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        f"--max_restarts={restarts}",
        "-m",
    ]
    launch = [sys.executable, "-m", *(torchrun if processes > 1 else []), WORKER]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(trouble or {})}
    done = subprocess.run(launch + flags, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / output / f"sft_{settings['model_name']}"
    final = run / "final/model.safetensors"
    return read_metrics(run / "metrics.jsonl"), load_file(final) if final.exists() else None, done.stdout + done.stderr


def figures(records, *names):
    """What is comparable in metrics: everything but times, or the named figures."""
    times = ("tokens_per_s", "mfu")
    return [
        {key: value for key, value in record.items() if (key in names if names else key not in times)}
        for record in records
    ]


def sft_folder(path: Path) -> Path:
    """Write what train() reads, a tokenizer and token files, into `path`."""
    sft_files(path / "data", make_tokenizer(path / "tokenizer"))
    return path
