"""MFU and bits per character: the figures of a log line against their definitions."""

import itertools
import math
import os

import pytest
import torch

from engine.data.loader import StepLoader
from engine.planning import mfu
from engine.planning.mfu import HardwarePeak, published
from engine.runs.metrics import read_metrics
from engine.training.batch_plan import BatchPlan


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H20", 148),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_published_peaks_are_found_by_the_full_name(name, tflops):
    assert published(name, "bf16") == (tflops and tflops * 1e12)
    assert published(name, "fp32") == (tflops and tflops * 1e12 / 2)


def test_where_the_peak_comes_from(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert (
        str(HardwarePeak(torch.device("cuda"), "fp32")) == "156 TFLOPS (NVIDIA A100-SXM4-80GB, tf32, dense, published)"
    )
    assert str(HardwarePeak(torch.device("cuda"), "bf16", 300)) == "300 TFLOPS (--peak_tflops)"
    monkeypatch.setattr(mfu, "matmul_rate", lambda device, precision: 2e11)
    cpu = HardwarePeak(torch.device("cpu"), "bf16")
    assert str(cpu) == "0.2 TFLOPS (bf16 matmul, measured here at the start)"
    assert cpu.share(1e6, 5e4, devices=2) == pytest.approx(1e6 * 5e4 / 4e11)


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), pytest.param("bf16", torch.bfloat16, marks=pytest.mark.slow)]
)
def test_the_matmul_rate_is_that_of_the_fastest_matmul_in_the_precision(monkeypatch, precision, dtype):
    """By a clock that gives the n-th of eight matmuls 0.9, 0.8, ... 0.2 s."""
    seconds = itertools.accumulate(step for n in range(8) for step in (1.0, 0.9 - 0.1 * n))
    dtypes, ones = [], torch.ones
    monkeypatch.setattr(mfu.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(
        torch, "ones", lambda *size, dtype, **more: dtypes.append(dtype) or ones(*size, dtype=dtype, **more)
    )
    rate = mfu.matmul_rate.__wrapped__(torch.device("cpu"), precision)
    assert rate == pytest.approx(2 * 1024**3 / 0.2) and dtypes == [dtype]


def test_the_matmul_rate_is_measured_once():
    rate = mfu.matmul_rate(torch.device("cpu"), "fp32")
    assert mfu.matmul_rate(torch.device("cpu"), "fp32") == rate


@pytest.mark.parametrize("given", [0.0, 1e-3])
@pytest.mark.parametrize(
    "again, peak, source", [(4e9, 4e9, "fp32 matmul, measured again"), (2e9, 3e9, "the most reached here")]
)
def test_a_peak_that_is_exceeded_is_measured_again(monkeypatch, capsys, given, again, peak, source):
    """At first 1 GFLOPS, given or measured on a busy machine; the run reaches 3 per device."""
    monkeypatch.setattr(mfu, "matmul_rate", lambda device, precision: 1e9)
    measured = []
    monkeypatch.setattr(mfu, "measure_matmuls", lambda device, precision: measured.append(precision) or again)
    found = HardwarePeak(torch.device("cpu"), "fp32", given)
    assert found.share(1e6, 1000, devices=2) == 0.5 and not measured  # not exceeded
    assert found.share(1e6, 6000, devices=2) == 3e9 / peak and (found.flops, found.source) == (peak, source)
    assert found.share(1e6, 6000, devices=2) == 3e9 / peak and measured == ["fp32"]  # and only once
    assert found.share(1e6, 1000, devices=2) == 5e8 / peak
    (line,) = capsys.readouterr().out.splitlines()
    assert "0.003 TFLOPS per device are above the peak of 0.001 TFLOPS" in line and str(found) in line


def test_a_published_peak_that_is_exceeded_is_not_that_of_this_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(mfu, "measure_matmuls", lambda device, precision: 3e14)
    found = HardwarePeak(torch.device("cuda"), "bf16")
    assert found.share(1e9, 121e3, devices=1) == 1 and "published" in found.source
    assert found.share(1e9, 150e3, devices=1) == 0.5 and "published" not in found.source


def test_no_mfu_of_a_run_or_a_dry_run_is_above_100_percent(training, capsys):
    summary = training.run(max_steps=5, peak_tflops=1e-9)
    records = [record for record in read_metrics(os.path.join(summary["run"], "metrics.jsonl")) if "mfu" in record]
    assert len(records) == 5 and all(0 <= record["mfu"] <= 1 for record in [*records, summary])
    shown = capsys.readouterr().out
    assert 1 <= shown.count("100% MFU is now") <= 5 and summary["peak_flops"] > 1e3
    training.run(max_steps=5, peak_tflops=1e-9, dry_run=True)
    shown = capsys.readouterr().out
    share = float(shown.split("MFU ")[-1].split("%")[0])
    assert 0 <= share <= 100


def test_mfu_and_bits_per_character_of_a_run(training, capsys):
    summary = training.run(max_steps=2, peak_tflops=0.1, max_batch_size=4, global_batch_size=8)
    first, second = [r for r in read_metrics(os.path.join(summary["run"], "metrics.jsonl")) if "mfu" in r]
    flops = 6 * (sum(p.numel() for p in training.model.parameters()) - training.model.tok_embed.weight.numel())
    assert first["mfu"] == pytest.approx(flops * first["tokens_per_s"] / 1e11, rel=0.01, abs=1e-4)
    assert min(first["mfu"], second["mfu"]) <= summary["mfu"] <= max(first["mfu"], second["mfu"])
    assert summary["peak_flops"] == 1e11 and "100% MFU: 0.1 TFLOPS (--peak_tflops) x 1" in capsys.readouterr().out

    torch.manual_seed(1337)
    model = type(training.model)(training.model.args)  # as it was at the first step
    nats = characters = 0
    for batch in StepLoader(training.sequences, BatchPlan(8, 4, 2), seed=1337, start=0, total_steps=2).make(0).batches:
        logits, _, _ = model(batch["input_ids"], doc_ids=batch["doc_ids"])
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum"
        ).item()
        characters += int((batch["targets"] >= 16).sum())  # one byte is one token; the ids below are special
    assert first["bpc"] == pytest.approx(nats / math.log(2) / characters, rel=1e-5)
