"""--max_batch_size=0: as many sequences as fit, the same loss curve, the same micro-batch after a resume."""

import os
import signal
from contextlib import nullcontext

import pytest
import torch
import yaml

from engine.distributed import process_group
from engine.planning import memory
from engine.planning.batch_size import find_max_batch_size, largest_fit
from engine.runs.metrics import read_metrics
from engine.training.config import TrainConfig
from engine.training.optim import build_optimizer
from tests.support.tiny_model import TinyModel, TinyModelArgs
from utils.errors import UserError, run_script

MB = 2**20


class Narrow(TinyModel):
    """Runs out of memory beyond `fits` sequences; receives SIGTERM in step `stop_at`."""

    fits, stop_at = 4, None

    def before_step(self, step, total_steps):
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def forward(self, input_ids, targets=None, doc_ids=None):
        if self.training and len(input_ids) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(input_ids, targets, doc_ids)


def losses(summary):
    records = read_metrics(os.path.join(summary["run"], "metrics.jsonl"))
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize(
    "at_most, room, found", [(64, 100, 8), (64, 79, 4), (6, 100, 6), (1, 20, 1), (64, 19, 0), (12, 1000, 12)]
)
def test_the_largest_size_is_found_without_ever_taking_too_much(at_most, room, found):
    asked = []

    def bytes_for(count):
        asked.append(count)
        return 10 + 10 * count if count == 1 else 10 * count  # the first pass takes a little more

    assert largest_fit(at_most, room, bytes_for)[0] == found
    assert all(10 * count <= room for count in asked[1:])


def test_running_out_of_memory_is_caught_and_other_errors_are_not():
    def bytes_for(count):
        if count > 4:
            raise error
        return count

    error = torch.OutOfMemoryError()
    assert largest_fit(64, 1000, bytes_for) == (4, 4)
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")
    assert largest_fit(64, 1000, bytes_for) == (4, 4)
    error = RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"):
        largest_fit(64, 1000, bytes_for)


def test_a_run_that_takes_too_much_ends_in_one_line(training, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda: training.run(model_class=Narrow, max_batch_size=8))
    output = capsys.readouterr().err.splitlines()[-1]
    assert (
        "error: out of memory (CUDA out of memory. Tried" in output and "--max_batch_size; 0 finds what fits" in output
    )


def test_the_smallest_device_decides(monkeypatch):
    of_another = iter([0, 0, 0, 0, 0, 1])  # it runs out of memory in the third of its trials
    monkeypatch.setattr(process_group, "sum_numbers", lambda numbers: [numbers[0] + next(of_another)])
    assert largest_fit(64, 1000, lambda count: count)[0] == 2


def test_a_run_takes_what_fits_and_keeps_its_curve(training, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 2**40)
    given = training.run(global_batch_size=16, max_batch_size=4, resume="never")
    found = training.run(global_batch_size=16, max_batch_size=0, resume="never", model_class=Narrow)
    assert losses(found) == losses(given)
    with open(found["run"] + "/config.yaml", encoding="utf-8") as file:
        assert yaml.safe_load(file)["max_batch_size"] == 4
    monkeypatch.setattr(Narrow, "fits", 0)
    with pytest.raises(UserError, match="not even one sequence of 32 tokens fits"):
        training.run(global_batch_size=16, max_batch_size=0, resume="never", model_class=Narrow)


def test_a_resumed_run_keeps_its_micro_batch(training, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 2**40)
    settings = dict(
        global_batch_size=16, max_batch_size=0, model_class=Narrow, model_fields={"dropout": 0.1}
    )  # drawn again for each micro-batch
    uninterrupted = training.run(**settings, output_path=str(training.path / "uninterrupted"))
    monkeypatch.setattr(Narrow, "stop_at", 2)
    assert training.run(**settings)["steps"] == 3
    monkeypatch.setattr(Narrow, "stop_at", None)
    monkeypatch.setattr(Narrow, "fits", 16)  # a larger device now
    rest = training.run(**settings)
    assert rest["steps"] == 6 and losses(rest) == losses(uninterrupted)


@pytest.mark.skipif(not (memory.PROC / "self/clear_refs").exists(), reason="the peak cannot be reset here")
def test_sequences_are_measured_against_a_memory_limit(training, monkeypatch):
    class Wide(TinyModel):
        def forward(self, input_ids, targets=None, doc_ids=None):
            logits, loss, other_vars = super().forward(input_ids, targets, doc_ids)
            wide = (
                loss * torch.ones(len(input_ids), 9 * MB)
            ).exp()  # 36 MB per sequence, four times with its gradients
            return logits, loss + 0 * wide.mean(), other_vars

    # beyond 32 MB the allocator of the system gives every tensor memory of its own, whatever earlier tests left there
    model = Wide(TinyModelArgs(vocab_size=training.tokenizer.vocab_size, max_seq_len=32))
    optimizer, cpu = build_optimizer(model, TrainConfig()), torch.device("cpu")
    for limit, found in ((420, 1), (900, 2)):  # MB, of which half may be used; 4 sequences take 576
        monkeypatch.setattr(memory, "available", lambda device, limit=limit: limit * MB)
        assert find_max_batch_size(16, model, optimizer, training.sequences, cpu, nullcontext) == found
    assert all(p.grad is None for p in model.parameters())


def test_what_is_free_is_what_the_container_leaves_divided_among_its_processes(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory.cgroup_limit(tmp_path) is None and memory.cgroup_limit(tmp_path / "none") is None
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.cgroup_limit(tmp_path) == 4000
    monkeypatch.setattr(memory, "cgroup_limit", lambda folder: 4000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available(torch.device("cpu")) == 1000
    monkeypatch.setattr(memory, "process_limit", lambda: 300)
    assert memory.available(torch.device("cpu")) == 300
    monkeypatch.setattr(memory, "PROC", tmp_path)
    assert memory.available(torch.device("cpu")) is None
