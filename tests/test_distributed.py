"""Two processes (torchrun, gloo) give what one gives."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from engine.distributed import process_group
from tests.support.paths import ROOT
from tests.support.torchrun import figures, sft_folder, train
from utils.errors import UserError


def test_a_thread_still_at_work_does_not_abort_a_process_that_has_finished():
    """As one of gloo's may be; without the way out of run_script this one aborts."""
    code = """
import atexit, threading, torch
from utils.errors import run_script
def main():
    number = torch.ones(100)
    threading.Thread(target=lambda: [number + number for _ in iter(int, 1)], daemon=True).start()
    atexit.register(print, "and left")
    print("finished")
run_script(main)"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "WORLD_SIZE": "2"},
        text=True,
        cwd=ROOT,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "finished\nand left\n"), done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sft_folder(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def two_ranks(folder):
    return train(folder, 2, "two")


def test_two_processes_give_the_same_curve(folder, two_ranks):
    one, weights, _ = train(folder, 1, "one")
    two, theirs, _ = two_ranks
    assert [r["step"] for r in one] == [r["step"] for r in two] and len(one) == 10  # 8 steps, 2 evaluations
    for ours, other in zip(one, two):
        for key in ("loss", "grad_norm", "val_loss", "val_bpc"):
            if key in ours:
                assert other[key] == pytest.approx(ours[key], rel=1e-5), (ours["step"], key)
        assert ours["tokens"] == other["tokens"]
    for name, value in weights.items():
        assert (value - theirs[name]).abs().max() < 1e-4, name
    assert (weights["bias"] == theirs["bias"]).all()


@pytest.mark.slow
def test_the_process_with_the_least_memory_decides_the_micro_batch(folder, two_ranks):
    found, _, output = train(folder, 2, "fit", {"ROWS_FIT": "2"}, max_batch_size=0)
    assert "micro-batch: 2 sequences fit" in output and "8 per step (2 x 2 x 2)" in output
    for ours, other in zip(two_ranks[0], found, strict=True):
        assert {**ours, **other}.keys() == ours.keys()
        assert other.get("loss", 0) == pytest.approx(ours.get("loss", 0), rel=2e-4)  # one term weighs by targets


@pytest.mark.slow
def test_the_number_of_processes_may_change_on_resume(folder):
    """1 -> 2 -> 1 processes, stopped by a signal in between: the curve of one process, to the bit, dropout included.

    Two micro-batches per step, so that both sums of gradients have the same two terms.
    """
    settings = {"model.dropout": 0.1, "max_steps": 7, "eval_interval": 0}
    for processes, stop in ((1, "2"), (2, "4"), (1, "")):
        changed, weights, _ = train(folder, processes, "changing", {"STOP_AT": stop}, **settings)
    steady, theirs, _ = train(folder, 1, "steady", **settings)
    assert [r["step"] for r in changed] == [*range(1, 8), 7] and figures(changed) == figures(steady)
    assert all(torch.equal(value, theirs[name]) for name, value in weights.items())


@pytest.mark.slow
def test_a_bad_step_is_skipped_on_all_ranks(folder):
    """The loss of one rank alone is a NaN in step 3."""
    records, weights, output = train(folder, 2, "nan", {"NAN_AT": "3"}, max_steps=40)
    assert output.count("step 3 skipped: loss nan") == 1
    assert [(r["step"], len(r["rows"])) for r in records if "skipped" in r] == [(3, 8)]
    assert records[-1]["val_loss"] < 0.2 * records[0]["loss"]
    assert all(torch.isfinite(value).all() for value in weights.values())
    one, _, _ = train(folder, 1, "nan_alone", {"NAN_AT": "3"}, max_steps=40)  # both micro-batches: the same step goes
    assert figures(one, "loss") == figures(records, "loss")


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_the_curve_is_the_same(folder, two_ranks):
    records, weights, output = train(folder, 2, "killed", {"KILL_AT": "6"}, restarts=1, save_interval=2)
    assert "from step 4" in output
    peace, theirs, _ = two_ranks
    assert figures(records) == figures(peace)
    assert all(torch.equal(value, theirs[name]) for name, value in weights.items())


def test_processes_agree_on_a_prefix_whatever_earlier_attempts_left():
    """Attempts over one store: after one that ended well, and one whose offer is still there; one rank is late."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def meet(rank, delay):
        time.sleep(delay)
        client = dist.TCPStore("localhost", server.port, is_master=False, timeout=timedelta(seconds=60))
        return process_group.agree_on_prefix(client, rank, 3)

    def attempt(delays):
        with ThreadPoolExecutor(3) as pool:
            names = set(pool.map(meet, range(3), delays))
        assert len(names) == 1
        return names.pop()

    first = attempt((0, 0, 0))
    server.set("offer", "dead")
    server.set("dead/accepted/1", "")
    assert len({first, "dead", attempt((0.3, 0, 0)), attempt((0, 0.3, 0))}) == 4


def test_devices(monkeypatch):
    assert process_group.find_device("cpu").type == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--device=cuda, but PyTorch sees no CUDA device"):
        process_group.find_device("cuda")
