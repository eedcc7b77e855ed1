"""What must not spoil a run: bad steps, spikes, mistakes of a plugin, failed starts, full disks, no learning at all."""

import json
import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.runs import checkpoint_manager
from engine.runs.checkpoint import find_checkpoints, newest_checkpoint
from engine.runs.metrics import read_metrics
from engine.runs.run_folder import lock_folder
from engine.training.bad_steps import MIN_RECENT, outlier_threshold
from tests.support.faulty_disk import mount_small
from tests.support.runs import losses, same, stop_after
from tests.support.tiny_model import TinyModel
from utils.errors import UserError


@dataclass
class Poison:
    """Multiplies the training loss of some steps (counted from 1) by a factor."""

    steps: set
    factor: float

    def model(self):
        poison = self

        class Poisoned(TinyModel):
            def __init__(self, args):
                super().__init__(args)
                self.register_buffer("mean", torch.zeros(()))  # moved by forward, which it should not

            def before_step(self, step, total_steps):
                self.factor = poison.factor if step + 1 in poison.steps else 1.0

            def forward(self, input_ids, targets=None, doc_ids=None):
                logits, loss, other_vars = super().forward(input_ids, targets, doc_ids)
                if self.training and targets is not None:
                    loss = loss * self.factor
                    self.mean += 0.1 * (loss.detach() - self.mean)
                    other_vars["moe/load"] = other_vars["moe/load"] * self.factor
                return logits, loss, other_vars

        return Poisoned


def test_a_bad_step_is_skipped_counted_and_named(training, capsys):
    summary = training.run(model_class=Poison({3, 5}, math.nan).model(), max_steps=12)
    assert summary["status"] == "finished" and summary["skipped_steps"] == 2
    assert "step 3 skipped: loss nan" in capsys.readouterr().err
    assert all(torch.isfinite(value).all() for value in training.weights().values())  # the buffers too
    records = read_metrics(summary["run"] + "/metrics.jsonl")
    skipped = [r for r in records if "skipped" in r]
    assert [(r["step"], len(r["rows"]), r["epoch"]) for r in skipped] == [(3, 4, 0), (5, 4, 0)]
    assert [r["step"] for r in records if r.get("loss") is None and "lr" in r] == [3, 5]  # null: JSON knows no NaN
    assert "NaN" not in open(summary["run"] + "/metrics.jsonl").read()


@pytest.mark.parametrize(
    "recipe, factor", [({"optimizer": "adamw"}, math.inf), ({"optimizer": "muon", "ema": 0.9}, math.nan)]
)
def test_a_skipped_step_changes_nothing(training, recipe, factor):
    """Weights, buffers, the optimizer's state and the average, to the bit."""

    def left(steps, poison):
        run = training.run(
            model_class=poison.model(), max_steps=steps, resume="never", lr_schedule="constant", **recipe
        )
        checkpoint = newest_checkpoint(Path(run["run"]))
        parts = torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizers"]
        states = {
            (number, at, key): value
            for number, part in enumerate(parts)
            for at, state in part["state"].items()
            for key, value in state.items()
        }
        tensors = {**load_file(checkpoint / "model.safetensors"), **states}
        return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}

    assert left(4, Poison({4}, factor)) == left(3, Poison(set(), 1.0))


@pytest.mark.parametrize("log_interval", [1, 50])
def test_ten_bad_steps_in_a_row_stop_the_run(training, log_interval):
    """Also when the host learns of the tenth in the step after it."""
    with pytest.raises(UserError, match="10 steps in a row were skipped, the last 14"):
        training.run(
            model_class=Poison(set(range(5, 99)), math.nan).model(),
            max_steps=30,
            save_interval=4,
            log_interval=log_interval,
        )
    folder = training.path / "output/pretrain_tiny"
    assert newest_checkpoint(folder).name == "step-00000012"
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl") if "skipped" in r] == list(range(5, 15))


@pytest.mark.slow
def test_log_and_save_intervals_change_nothing(training):
    """Spikes at steps 50, 51 and 54: what is skipped, saved and counted is the same as with a log line at each step."""

    def left(log_interval, save_interval):
        run = training.run(
            model_class=Poison({50, 51, 54}, 40.0).model(),
            max_steps=55,
            resume="never",
            ema=0.9,
            log_interval=log_interval,
            save_interval=save_interval,
        )
        skipped = [r for r in read_metrics(run["run"] + "/metrics.jsonl") if "skipped" in r]
        assert [r["step"] for r in skipped] == [50, 51, 54]
        state = torch.load(newest_checkpoint(Path(run["run"])) / "trainer_state.pt", weights_only=True)
        del state["seconds"]
        return skipped, state, run["train_loss"], {name: w.numpy().tobytes() for name, w in training.weights().items()}

    assert left(1, 0) == left(100, 10)


def test_a_spike_is_skipped_and_remembered_over_a_resume(training, monkeypatch, capsys):
    spiky = Poison({50, 55}, 30.0).model()
    settings = dict(model_class=spiky, max_steps=60)
    uninterrupted = training.run(**settings, output_path=str(training.path / "uninterrupted"))
    weights, errors = training.weights(), capsys.readouterr().err
    assert (
        uninterrupted["skipped_steps"] == 2
        and "step 50 skipped: a spike: gradient norm" in errors
        and "recent median" in errors
    )
    with monkeypatch.context() as patch:
        patch.setattr(spiky, "before_step", stop_at(spiky.before_step, 53))
        half = training.run(**settings)
        assert half["steps"] < 55 and half["skipped_steps"] == 1
    rest = training.run(**settings)
    assert rest["skipped_steps"] == 2 and losses(rest) == losses(uninterrupted) and same(weights, training.weights())
    assert training.run(**settings, spike_bound=0.0)["skipped_steps"] == 0


def test_a_skipped_step_is_logged_when_the_run_dies_in_the_next(training, capsys):
    class Dying(Poison({3}, math.nan).model()):
        def before_step(self, step, total_steps):
            super().before_step(step, total_steps)
            if step == 3:
                raise MemoryError

    with pytest.raises(MemoryError):
        training.run(model_class=Dying, max_steps=6, log_interval=50)
    assert "step 3 skipped" in capsys.readouterr().err
    records = read_metrics(training.path / "output/pretrain_tiny/metrics.jsonl")
    assert [record["step"] for record in records if "skipped" in record] == [3]


def stop_at(hook, at):
    def before_step(self, step, total_steps):
        hook(self, step, total_steps)
        if step + 1 == at:
            os.kill(os.getpid(), 15)

    return before_step


def test_outlier_threshold_against_numpy():
    random = np.random.default_rng(0)
    recent = random.normal(1.0, 0.3, 128).tolist()
    spread = 1.4826 * np.median(np.abs(np.array(recent) - np.median(recent)))
    edge = np.median(recent) + 7 * spread
    assert outlier_threshold(recent, 7) == pytest.approx(math.exp(edge), rel=1e-12)
    assert (
        outlier_threshold(recent[: MIN_RECENT - 1], 7)
        == outlier_threshold(recent, 0.0)
        == outlier_threshold(recent, 1e9)
        == math.inf
    )
    assert 1.3 < outlier_threshold([0.0] * 100, 10) < 2.0  # a constant loss


def test_nan_weights_are_neither_saved_nor_final(training):
    class Breaking(TinyModel):
        def after_step(self, other_vars):
            if self.calls == 3:
                self.layers[0].weight.data.fill_(math.nan)
            self.calls += 1

        calls = 0

    with pytest.raises(UserError, match=r"step 4: layers.0.weight holds a NaN, so this state is not saved"):
        training.run(model_class=Breaking, max_steps=4, save_interval=2)
    folder = training.path / "output/pretrain_tiny"
    assert newest_checkpoint(folder).name == "step-00000002" and not (folder / "final").exists()


def test_a_short_run_of_skipped_steps_is_not_finished(training):
    with pytest.raises(UserError, match="not one of 3 steps could be taken"):
        training.run(model_class=Poison({1, 2, 3}, math.nan).model(), max_steps=3)

    class Silent(TinyModel):
        def forward(self, input_ids, targets=None, doc_ids=None):
            logits, loss, other_vars = super().forward(input_ids, targets, doc_ids)
            if targets is not None and not self.training:
                other_vars["loss/ce"] = other_vars["loss/ce"] * math.nan
            return logits, loss, other_vars

    with pytest.raises(UserError, match="the held-out loss is nan, so there are no final weights"):
        training.run(model_class=Silent, max_steps=3, max_lr=0.02)
    assert not list(training.path.glob("output/*/final"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda logits, loss, other_vars: (loss, other_vars), "forward returns 2 values, and must return three"),
        (lambda logits, loss, other_vars: loss, "forward returns a Tensor, and must return three"),
        (
            lambda logits, loss, other_vars: (logits, loss, {**other_vars, "moe/load": 0.5}),
            "other_vars['moe/load'] is a float, and must be a tensor",
        ),
        (lambda logits, loss, other_vars: (logits, None, other_vars), "the loss must be 0-d with its graph"),
        (lambda logits, loss, other_vars: (logits, loss.detach(), other_vars), "it is without a graph"),
        (lambda logits, loss, other_vars: (logits, loss, [1]), "other_vars is a list"),
    ],
)
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_a_mistake_of_a_plugin_is_one_line_and_leaves_no_folder(training, change, message, z_loss):
    class Wrong(TinyModel):
        def forward(self, input_ids, targets=None, doc_ids=None):
            return change(*super().forward(input_ids, targets, doc_ids))

    with pytest.raises(UserError) as caught:
        training.run(model_class=Wrong, z_loss=z_loss)
    assert (
        message in str(caught.value) and "tests/test_safety.py: " in str(caught.value) and "\n" not in str(caught.value)
    )
    assert not list((training.path / "output").iterdir())


def test_a_start_cut_short_leaves_its_folder_to_the_next_run(training, monkeypatch):
    folder = training.path / "output/pretrain_tiny"
    folder.mkdir(parents=True)
    (folder / ".lock").touch()  # killed while the run's files were written
    (folder / "config.yaml").write_text("stage: pretrain\n")
    assert training.run(max_lr=0.02)["run"] == str(folder)
    (training.path / "output/pretrain_tiny_2").mkdir()
    assert training.run(max_lr=0.03)["run"] == f"{folder}_2"
    (training.path / "output/pretrain_tiny_3").mkdir()
    (training.path / "output/pretrain_tiny_3/notes.txt").touch()  # not ours
    assert training.run(max_lr=0.04)["run"] == f"{folder}_4"
    (training.path / "output/pretrain_tiny_5").mkdir()
    with lock_folder(training.path / "output/pretrain_tiny_5"):  # another process starts right now
        assert training.run(max_lr=0.05)["run"] == f"{folder}_6"


def test_the_path_of_the_run_is_written_where_asked(training):
    file = training.path / "where"
    first = training.run(write_run_path=str(file))
    assert file.read_text() == first["run"] + "\n"
    other = training.run(write_run_path=str(file), max_lr=0.02)
    assert file.read_text() == other["run"] + "\n" and other["run"] != first["run"]
    training.run(write_run_path=str(file))  # finished before: the same run again
    assert file.read_text() == first["run"] + "\n"


def test_disk_space_is_checked_before_the_run_and_before_a_save(training, monkeypatch, capsys):
    free = []
    monkeypatch.setattr(checkpoint_manager.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free[0]}))
    monkeypatch.setattr(checkpoint_manager, "PAUSE_SECONDS", 0)
    free[:] = [50_000]
    with pytest.raises(UserError, match="needs about .* for 3 checkpoints, the one being written and the final"):
        training.run(save_interval=2, max_steps=20)
    assert not (training.path / "output").exists()
    free[:] = [10_000_000]

    class Filling(TinyModel):
        def before_step(self, step, total_steps):
            free[:] = [100 if 3 <= step < 6 else 10_000_000]

    summary = training.run(save_interval=4, max_steps=9, model_class=Filling)
    errors = capsys.readouterr().err
    assert "step 4: the checkpoint could not be saved ([Errno 28]" in errors and "next try is at step 5" in errors
    assert "step 5: the checkpoint could not" in errors and "next try is at step 7" in errors
    assert [f.name[-1] for f in find_checkpoints(training.path / "output/pretrain_tiny")] == ["9", "8"]
    assert summary["status"] == "finished"


def test_a_save_that_fails_when_the_run_is_to_stop_is_an_error(training, monkeypatch):
    def full(*_):
        raise OSError("full")

    monkeypatch.setattr(checkpoint_manager, "save_checkpoint", full)
    monkeypatch.setattr(checkpoint_manager, "PAUSE_SECONDS", 0)
    with pytest.raises(UserError, match="step 3 could not be saved .full.: make room"):
        stop_after(training, monkeypatch, 3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer dies
def test_a_run_continues_on_a_disk_that_is_full_for_a_while(training, monkeypatch, capsys):
    """A tmpfs fills up in step 3 and has room again in step 12: only saves are missing at the end."""
    monkeypatch.setattr(checkpoint_manager, "PAUSE_SECONDS", 0)
    disk = training.path / "disk"
    if not mount_small(disk, "2m"):
        pytest.skip("no right to mount a tmpfs")
    try:

        class Filling(TinyModel):
            def before_step(self, step, total_steps):
                if step == 3:
                    with open(disk / "other", "wb", buffering=0) as file:
                        for size in (4096, 1):
                            try:
                                while file.write(b"x" * size):
                                    pass
                            except OSError:
                                pass
                if step == 12:
                    (disk / "other").unlink()

        settings = dict(max_steps=16, save_interval=2, sample_interval=3, eval_interval=4, model_class=Filling)
        summary = training.run(**settings, output_path=str(disk / "output"))
        errors = capsys.readouterr().err
        assert "could not be saved" in errors and "its curves cannot be written" in errors
        monkeypatch.setattr(Filling, "before_step", lambda *_: None)
        peace = training.run(**settings)
        assert losses(summary) == losses(peace) and losses(summary, "val_loss") == losses(peace, "val_loss")
        assert summary["status"] == "finished" and json.loads((disk / "output/pretrain_tiny/summary.json").read_text())
        assert newest_checkpoint(disk / "output/pretrain_tiny").name == "step-00000016"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
