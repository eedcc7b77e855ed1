"""Kills a training repeatedly, gives the same command after each kill, and compares with an uninterrupted run.

    python -m tests.support.kill_worker MODEL KILLS FOLDER        prints one JSON object

A process that has imported everything forks one that trains, as `python pretrain.py ...` would, so that a kill costs no
import of PyTorch. The kill is a SIGKILL to the process that trains, at a random moment: every third while it saves.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401
import torch
import torch.utils.tensorboard  # noqa: F401

import pretrain
from engine.runs.metrics import read_metrics
from tests.support.make_tokenizer import make_tokenizer
from tests.support.models import sizes_of
from tests.support.token_files import pretrain_files

SMALL = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 16,
    "inter_dim": 64,
    "moe_inter_dim": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_activated_experts": 2,
    "n_dense_layers": 1,
}
TIMES = ("tokens_per_s", "seconds", "mfu")


def command(model: str, output: Path) -> list[str]:
    sizes = [f"--model.{key}={value}" for key, value in sizes_of(model, SMALL).items()]
    data = output.parent
    return [
        f"--model_name={model}",
        "--device=cpu",
        "--precision=fp32",
        "--skip_checks",
        "--max_seq_len=32",
        *sizes,
        "--max_batch_size=2",
        "--accumulation_steps=2",
        "--max_steps=20",
        "--save_interval=2",
        "--log_interval=1",
        "--eval_interval=7",
        "--eval_batches=1",
        "--sample_interval=11",
        "--ema=0.9",
        f"--output_path={output}",
        f"--tokenizer_path={data}/tokenizer",
        f"--pretrain_data_path={data}/pretrain_train.bin",
    ]


def start(arguments: list[str], log: Path) -> int:
    """Fork a process that trains, and return its id."""
    child = os.fork()
    if child:
        return child
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        pretrain.main(arguments)
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def kill_at_random(child: int, output: Path, chance: random.Random, seconds: float, inside: bool) -> tuple[bool, bool]:
    """Wait, then kill; return (it was still alive, it was saving). inside: wait for a save as well."""
    end = time.monotonic() + chance.random() * seconds
    saving = False
    while time.monotonic() < end or (inside and not saving):
        if os.waitpid(child, os.WNOHANG)[0]:
            return False, False
        time.sleep(0.0005)
        saving = time.monotonic() >= end and any(output.glob("*/checkpoints/.step-*.tmp/*")) if inside else False
    saving = any(output.glob("*/checkpoints/.*")) or any(output.glob("*/.final.*"))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True, saving


def result(output: Path) -> dict:
    """The result of a finished run: metrics except times, sha256 of the final weights, and the number of runs."""
    runs = list(output.iterdir())
    records = [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in read_metrics(runs[0] / "metrics.jsonl")
    ]
    final = runs[0] / "final/model.safetensors"
    samples = (runs[0] / "samples.md").read_text(encoding="utf-8")
    return {
        "runs": len(runs),
        "records": records,
        "samples": samples,
        "best": summary(runs[0])["best_checkpoint"],
        "train_loss": summary(runs[0])["train_loss"],
        "sha256": hashlib.sha256(final.read_bytes()).hexdigest(),
    }


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def main() -> None:
    model, kills, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    pretrain_files(folder, make_tokenizer(folder / "tokenizer"))
    chance, log = random.Random(int(os.environ.get("SEED", "0"))), folder / "log.txt"
    started = time.monotonic()
    code = os.waitpid(start(command(model, folder / "uninterrupted"), log), 0)[1]
    seconds = time.monotonic() - started
    assert code == 0, log.read_text()
    expected = result(folder / "uninterrupted")
    report = {"model": model, "kills": 0, "inside_a_save": 0, "finished_runs": 0, "different": []}
    while report["kills"] < kills:
        output = folder / f"killed-{report['finished_runs']}"
        while True:
            child = start(command(model, output), log)
            enough = report["kills"] >= kills
            alive, saving = (
                (False, False)
                if enough
                else kill_at_random(child, output, chance, 0.5 * seconds, report["kills"] % 3 == 0)
            )
            if enough:
                os.waitpid(child, 0)
            if not alive:
                break
            report["kills"] += 1
            report["inside_a_save"] += saving
        report["finished_runs"] += 1
        if not (output.is_dir() and any(output.glob("*/final"))):
            report["different"].append([str(output), "it did not finish", log.read_text()[-2000:]])
            break
        now = result(output)
        report["different"] += [[str(output), key] for key in expected if now[key] != expected[key]]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
