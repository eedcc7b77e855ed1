"""--precision=auto: on a CPU by a measurement, which is injected here; the run keeps what it began with."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from engine.runs.checkpoint import newest_checkpoint
from engine.training import precision, run
from engine.training.config import TrainConfig
from engine.training.precision import LARGEST, LEAST_SPEEDUP, TRIALS, resolve_precision
from engine.training.step import TrainStep
from tests.support.runs import losses, same, stop_after
from tests.support.tiny_model import TinyModel, TinyModelArgs
from utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def cpu(monkeypatch):
    """cpu(speedup): a CPU that multiplies bf16 so many times as fast as fp32; 0: without such instructions."""

    def become(speedup):
        asked = []

        def matmul_seconds(dtype, n_inputs, n_outputs):
            asked.append((dtype, n_inputs, n_outputs))
            return 1.0 if dtype == torch.float32 else 1 / speedup

        for module in (precision, run):
            monkeypatch.setattr(module, "fast_bf16", lambda device: speedup > 0)
        monkeypatch.setattr(precision, "matmul_seconds", matmul_seconds)
        return asked

    return become


class Matrices(TinyModel):
    """A tiny model with a stack of experts that is larger than any other matrix."""

    def __init__(self, args, *shape):
        super().__init__(args)
        self.experts = nn.Parameter(torch.empty(*shape, device="meta"))


def tiny(**fields):
    return TinyModel(TinyModelArgs(vocab_size=20, max_seq_len=8, **fields))


@pytest.mark.parametrize(
    "speedup, expected",
    [(0, "fp32"), (0.01, "fp32"), (1.0, "fp32"), (1.4, "fp32"), (LEAST_SPEEDUP, "bf16"), (3.0, "bf16"), (16, "bf16")],
)
def test_auto_is_bf16_where_the_cpu_multiplies_it_clearly_faster(cpu, capsys, speedup, expected):
    asked = cpu(speedup)
    assert resolve_precision("auto", CPU, tiny()) == expected
    assert len(asked) == (2 * TRIALS if speedup else 0)  # without instructions bf16 may take a hundred times longer
    assert (f"{speedup:.1f} times as fast" in capsys.readouterr().out) == (expected == "bf16")


@pytest.mark.parametrize("wanted", ["fp32", "bf16"])
@pytest.mark.parametrize("speedup", [0, 1.0, 5.0])
def test_a_precision_that_is_given_is_taken_without_a_measurement(cpu, wanted, speedup):
    asked = cpu(speedup)
    assert resolve_precision(wanted, CPU, tiny()) == wanted and not asked


def test_fp16_needs_cuda(cpu):
    cpu(5.0)
    with pytest.raises(UserError, match="fp16 needs CUDA"):
        resolve_precision("fp16", CPU, tiny())


def test_another_program_during_some_of_the_matmuls_does_not_decide(cpu, monkeypatch):
    cpu(3.0)
    for disturbed, true, expected in (
        (torch.bfloat16, 1 / 3, "bf16"),  # a fast CPU that was busy
        (torch.float32, 1.0, "fp32"),  # one on which bf16 is as slow, while fp32 was disturbed
    ):
        times = {torch.float32: 1.0, torch.bfloat16: true}
        calls = iter(range(1000))

        def matmul_seconds(dtype, *_, times=times, disturbed=disturbed, calls=calls):
            return times[dtype] * (20 if dtype == disturbed and next(calls) % TRIALS else 1)

        monkeypatch.setattr(precision, "matmul_seconds", matmul_seconds)
        assert resolve_precision("auto", CPU, tiny()) == expected


@pytest.mark.parametrize(
    "shape, sizes", [((3, 40, 24), (24, 40)), ((2, 5000, 64), (64, LARGEST)), ((9000, 9000), (LARGEST, LARGEST))]
)
def test_it_is_timed_at_the_size_of_the_largest_matrix_within_bounds(cpu, shape, sizes):
    asked = cpu(3.0)
    resolve_precision("auto", CPU, Matrices(TinyModelArgs(vocab_size=20, max_seq_len=8), *shape))
    assert {tuple(each[1:]) for each in asked} == {sizes}
    assert [each[0] for each in asked] == TRIALS * [torch.float32, torch.bfloat16]  # in turns


def test_a_model_without_matrices_stays_in_fp32(cpu, monkeypatch):
    asked, model = cpu(9.0), tiny()
    monkeypatch.setattr(model, "param_groups", lambda: {"matrix": [], "embed": [], "scalar": []})
    assert resolve_precision("auto", CPU, model) == "fp32" and not asked


def test_the_measurement_itself():
    assert 0 < precision.matmul_seconds(torch.float32, 24, 40) < 10
    assert precision.bf16_speedup(tiny()) > 0


def test_a_step_outside_of_the_loop_resolves_it_too(cpu):
    for speedup, expected in ((0, "fp32"), (4.0, "bf16")):
        cpu(speedup)
        step = TrainStep(tiny(), TrainConfig(compile="false"), CPU)
        assert (step.precision, step.dtype) == (expected, {"bf16": torch.bfloat16}.get(expected))


# ---------------------------------------------------------------- a run keeps what it began with


def config_of(summary):
    return yaml.safe_load(Path(summary["run"], "config.yaml").read_text())


@pytest.mark.parametrize(
    "first, later, expected", [pytest.param(4.0, 0, "bf16", marks=pytest.mark.slow), (1.2, 9.0, "fp32")]
)
def test_a_resumed_run_is_exact_whatever_is_measured_then(training, monkeypatch, cpu, capsys, first, later, expected):
    """On a busy machine, or another one, the measurement may come out differently."""
    cpu(first)
    uninterrupted = training.run(max_steps=4, resume="never")
    weights = training.weights()
    assert config_of(uninterrupted)["precision"] == expected
    stopped = stop_after(training, monkeypatch, 2, max_steps=4, resume="never", run_name="stopped")
    assert stopped["steps"] == 2 and config_of(stopped)["precision"] == expected
    asked = cpu(later)
    capsys.readouterr()
    summary = training.run(max_steps=4, run_name="stopped")
    assert summary["run"] == stopped["run"] and not asked
    assert losses(summary) == losses(uninterrupted) and same(training.weights(), weights)
    assert config_of(summary)["precision"] == expected
    assert ("no instructions" in capsys.readouterr().err) == (expected == "bf16" and not later)


@pytest.mark.slow
def test_the_two_precisions_can_be_distinguished_here(training, cpu):
    found = [losses(training.run(max_steps=4, precision=name)) for name in ("fp32", "bf16")]
    assert found[0] != found[1]


@pytest.mark.slow
def test_the_command_finds_its_run_whatever_is_measured(training, cpu):
    """Finished runs as well: the fingerprint holds the setting, config.yaml the precision."""
    cpu(4.0)
    first = training.run(max_steps=1)
    assert json.loads(Path(first["run"], "run.json").read_text())["identity"]["precision"] == "auto"
    cpu(0)
    assert training.run(max_steps=1) == first
    assert training.run(max_steps=1, precision="fp32")["run"] != first["run"]


def test_a_run_of_an_earlier_version_goes_on_in_fp32(training, monkeypatch, cpu):
    """Its config.yaml holds "auto", which was fp32 on every CPU."""
    cpu(0)
    expected = losses(training.run(max_steps=4, resume="never"))
    stopped = stop_after(training, monkeypatch, 2, max_steps=4, run_name="old")
    path = Path(stopped["run"], "config.yaml")
    path.write_text(path.read_text().replace("precision: fp32", "precision: auto"))
    cpu(9.0)
    summary = training.run(max_steps=4, run_name="old")
    assert losses(summary) == expected and config_of(summary)["precision"] == "fp32"


def test_resuming_a_named_run_in_another_precision_is_possible(training, monkeypatch, cpu):
    cpu(4.0)
    stopped = stop_after(training, monkeypatch, 2, max_steps=4)
    assert newest_checkpoint(Path(stopped["run"])) is not None
    summary = training.run(max_steps=4, resume=stopped["run"], precision="fp32")
    assert summary["steps"] == 4 and config_of(summary)["precision"] == "fp32"


def test_all_processes_take_the_precision_of_the_first(monkeypatch, cpu):
    """Each measures by itself, and two might disagree."""
    cpu(4.0)
    monkeypatch.setattr(run.process_group, "broadcast_object", lambda value: {"bf16": "of rank 0"}[value])
    directory = run.RunDirectory(Path("none"))
    assert run.run_precision(TrainConfig(), directory, tiny(), CPU) == "of rank 0"


@pytest.mark.slow
def test_a_dry_run_measures_in_the_precision_of_the_run(training, cpu, capsys):
    cpu(4.0)
    training.run(dry_run=True)
    assert "cpu bf16" in capsys.readouterr().out
