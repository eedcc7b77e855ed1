"""The loop, with a tiny model: exactness, resuming, safety, what a run folder holds."""

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from engine.data.loader import StepLoader
from engine.data.sequences import DocumentSequences
from engine.data.token_file import TokenFile
from engine.runs import checkpoint_manager
from engine.runs.checkpoint import newest_checkpoint
from engine.runs.metrics import RunLog, read_metrics
from engine.runs.registry import find_runs
from engine.runs.run_folder import lock_folder
from engine.training.batch_plan import BatchPlan
from tests.support.paths import ROOT
from tests.support.runs import losses, same, stop_after
from tests.support.tiny_model import TinyModel
from tests.support.token_files import sft_files
from utils.errors import UserError

TIMES = ("tokens_per_s", "seconds", "mfu")


def test_it_learns_and_leaves_a_complete_folder(training):
    summary = training.run(
        max_steps=60, eval_interval=20, save_interval=20, sample_interval=30, log_interval=10, keep_last=2
    )
    folder = training.path / "output" / "pretrain_tiny"
    assert summary["status"] == "finished" and summary["run"] == str(folder)
    assert summary["next_command"] == f"python next.py {folder}"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml",
        "run.json",
        "tiny_model.py",
        "metrics.jsonl",
        "logs",
        "samples.md",
        "checkpoints",
        "final",
        "summary.json",
        "loss_curve.png",
        "tokenizer",
        ".lock",
    }
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000040", "step-00000060"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    curve = losses(summary)
    assert curve[-1] < 0.7 * curve[0] and len(losses(summary, "val_loss")) == 3
    # each of the 12 documents has one token that is no target, and two that are no character
    tokens = len(training.val.file.tokens)
    assert summary["val_bpc"] == pytest.approx(summary["val_loss"] * (tokens - 12) / (tokens - 24) / np.log(2))
    assert (folder / "samples.md").read_text().count("## Step") == 2
    (run,) = find_runs(training.path / "output")
    assert (run.path, run.stage, run.model_name, run.step) == (folder, "pretrain", "tiny", 60)
    assert run.val_loss == summary["val_loss"]


def test_tensorboard_holds_everything_in_other_vars(training):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(training.path / os.path.join(training.run(max_steps=2)["run"], "logs")))
    board.Reload()
    assert {
        "train/loss",
        "train/lr",
        "train/tokens_per_s",
        "train/grad_norm",
        "train/mfu",
        "train/bpc",
        "val/loss",
        "val/bpc",
        "loss/ce",
        "loss/extra",
        "gradient_norm/layer_00",
        "gradient_norm/embed",
        "activation_rms/layer_01",
        "update_to_weight/matrix",
    } <= set(board.Tags()["scalars"])
    assert set(board.Tags()["histograms"]) == {"moe/load/00", "moe/load/01"}


def test_a_histogram_that_cannot_be_drawn_ends_no_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 0)
    record = {"step": 1} | dict.fromkeys(("loss", "bpc", "lr", "grad_norm", "tokens_per_s", "mfu"), 1.0)
    log.step(
        record,
        {
            name: torch.tensor([1.0, value])
            for name, value in (("fine", 2.0), ("huge", 1e30), ("infinite", float("inf")), ("none", float("nan")))
        },
    )
    log.close()
    board = EventAccumulator(str(tmp_path / "logs"))
    board.Reload()
    assert board.Tags()["histograms"] == ["fine"]


def test_two_runs_are_equal(training):
    first = training.run(model_fields={"dropout": 0.1})
    weights = training.weights()
    second = training.run(model_fields={"dropout": 0.1}, resume="never")
    records = [
        [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(s["run"] + "/metrics.jsonl")]
        for s in (first, second)
    ]
    assert records[0] == records[1]
    assert second["run"].endswith("_2") and losses(first) == losses(second) and same(weights, training.weights())


@pytest.mark.parametrize(
    "recipe", [{"optimizer": "muon"}, {"optimizer": "adamw"}, {"ema": 0.9, "batch_ramp_ratio": 0.7}]
)
def test_resuming_is_exact(training, monkeypatch, recipe):
    settings = dict(**recipe, model_fields={"dropout": 0.1}, lr_schedule="cosine")
    uninterrupted = training.run(**settings, output_path=str(training.path / "uninterrupted"))
    weights = training.weights()
    half = stop_after(training, monkeypatch, 3, **settings)
    assert half["status"].startswith("stopped by SIGTERM") and half["steps"] == 3
    assert not (training.path / "output/pretrain_tiny/final").exists()
    rest = training.run(**settings)
    assert rest["run"] == half["run"] and losses(rest) == losses(uninterrupted) and same(weights, training.weights())
    assert weights["bias"].abs().sum() > 0
    ours, theirs = read_metrics(rest["run"] + "/metrics.jsonl"), read_metrics(uninterrupted["run"] + "/metrics.jsonl")
    assert [{k: v for k, v in r.items() if k not in TIMES} for r in ours] == [
        {k: v for k, v in r.items() if k not in TIMES} for r in theirs
    ]
    assert {k: v for k, v in rest.items() if k not in (*TIMES, "run", "next_command")} == {
        k: v for k, v in uninterrupted.items() if k not in (*TIMES, "run", "next_command")
    }


def test_a_signal_in_the_last_evaluation_stops_the_run_and_a_resume_repeats_it(training, monkeypatch):
    settings = dict(max_batch_size=1, global_batch_size=4)
    uninterrupted = training.run(**settings, output_path=str(training.path / "uninterrupted"))
    weights, forward, seen = training.weights(), TinyModel.forward, []

    def signalled(self, input_ids, targets=None, doc_ids=None):
        if not self.training and targets is not None:
            seen.append(len(input_ids))
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, input_ids, targets, doc_ids)

    with monkeypatch.context() as patch:
        patch.setattr(TinyModel, "forward", signalled)
        half = training.run(**settings)
    assert half["status"].startswith("stopped by SIGTERM") and half["steps"] == 6 and half["val_loss"] is None
    assert len(seen) == 3 and len(training.val) > 3 and not (training.path / "output/pretrain_tiny/final").exists()
    rest = training.run(**settings)
    assert (
        rest["status"] == "finished"
        and rest["val_loss"] == uninterrupted["val_loss"]
        and losses(rest) == losses(uninterrupted)
    )
    assert rest["run"] == half["run"] and same(weights, training.weights())


def test_after_step_sees_the_mean_over_micro_batches(training):
    class Watching(TinyModel):
        seen = []

        def forward(self, input_ids, targets=None, doc_ids=None):
            logits, loss, other_vars = super().forward(input_ids, targets, doc_ids)
            return logits, loss, {**other_vars, "mean_id": input_ids.float().mean()}

        def after_step(self, other_vars):
            self.seen.append(other_vars["mean_id"].item())

    steps, size = 3, 8
    training.run(model_class=Watching, max_batch_size=2, global_batch_size=size, max_steps=steps)
    loader = StepLoader(training.sequences, BatchPlan(size, size, 1), seed=1337, start=0, total_steps=steps)
    uninterrupted = [loader.make(step).batches[0]["input_ids"].float().mean().item() for step in range(steps)]
    assert Watching.seen == pytest.approx(uninterrupted)


def test_held_out_loss_counts_the_cross_entropy_alone(training):
    summary = training.run(max_steps=2)
    loss_sum = targets = 0
    for i in range(len(training.val)):
        sequence = {key: torch.from_numpy(value)[None] for key, value in training.val.sequence(i).items()}
        logits, _, _ = training.model.eval()(sequence["input_ids"], doc_ids=sequence["doc_ids"])
        loss_sum += torch.nn.functional.cross_entropy(
            logits[0].double(), sequence["targets"][0], reduction="sum"
        ).item()
        targets += (sequence["targets"] != -100).sum().item()
    assert summary["val_loss"] == pytest.approx(loss_sum / targets, rel=1e-5)


def test_a_crash_costs_only_the_steps_since_the_save(training, monkeypatch):
    uninterrupted = training.run(output_path=str(training.path / "uninterrupted"), save_interval=2)
    weights = training.weights()

    def before_step(self, step, total_steps):
        if step == 5:
            raise KeyError("the machine dies")

    with monkeypatch.context() as patch:
        patch.setattr(TinyModel, "before_step", before_step)
        with pytest.raises(KeyError):
            training.run(save_interval=2)
    newest = newest_checkpoint(training.path / "output/pretrain_tiny")
    assert newest.name == "step-00000004"
    (newest / "model.safetensors").write_bytes(b"broken")  # and the newest checkpoint is damaged, too
    rest = training.run(save_interval=2)
    assert losses(rest) == losses(uninterrupted) and same(weights, training.weights())


def test_accumulation_does_not_change_the_curve(training):
    path, _ = sft_files(training.path / "data", training.tokenizer)
    masked = DocumentSequences(
        TokenFile(path, training.tokenizer, "make"), 32, pack=True, long="drop"
    )  # uneven targets
    runs = [
        training.run(
            sequences=masked,
            max_batch_size=size,
            global_batch_size=8,
            resume="never",
            optimizer="adamw",
            embed_lr_scale=1.0,
        )
        for size in (8, 4, 1)
    ]
    assert [run["run"][-2:] for run in runs] == ["ny", "_2", "_3"]
    for run in runs[1:]:
        assert losses(run) == pytest.approx(
            losses(runs[0]), rel=2e-4
        )  # the extra term weighs by targets, not by sequences
        assert losses(run, "val_loss") == pytest.approx(losses(runs[0], "val_loss"), rel=1e-4)


def test_the_average_is_evaluated_and_exported(training):
    raw = training.run(optimizer="adamw")
    seen = []

    class Watched(TinyModel):
        def before_step(self, step, total_steps):
            seen.append({name: value.detach().clone() for name, value in self.named_parameters()})

    summary = training.run(optimizer="adamw", ema=0.5, model_class=Watched)
    assert losses(summary) == losses(raw)  # the average is only looked at
    values = seen[1:] + [dict(training.model.named_parameters())]
    average = values[0]
    for n, now in enumerate(values[1:], start=2):
        decay = min(0.5, n / (n + 9))
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in average}
    final = load_file(os.path.join(summary["run"], "final/model.safetensors"))
    for name, value in average.items():
        torch.testing.assert_close(final[name], value.detach(), atol=1e-6, rtol=1e-5)
    assert not torch.equal(final["lm_head.weight"], values[-1]["lm_head.weight"])
    with torch.no_grad():
        for name, parameter in training.model.named_parameters():
            parameter.copy_(average[name])
    batch = {
        name: torch.stack([torch.from_numpy(training.val.sequence(i)[name]) for i in range(len(training.val))])
        for name in ("input_ids", "targets", "doc_ids")
    }
    assert summary["val_loss"] == pytest.approx(training.model.eval()(**batch)[2]["loss/ce"].item(), rel=1e-5)


class Reads(TorchDispatchMode):
    """Notes in `events` every value that the host reads from a tensor, and where a backward pass began."""

    def __init__(self, patch):
        super().__init__()
        self.events = []
        self.note(patch, "backward", lambda tensor: "backward")
        for name in ("tolist", "numpy"):  # which read the memory itself
            self.note(patch, name, lambda tensor: tensor.detach().clone())

    def note(self, patch, name, event):
        method = getattr(torch.Tensor, name)

        def noted(tensor, *args, **how):
            if threading.current_thread() is threading.main_thread():  # not of the loader, which is ahead
                self.events.append(event(tensor))
            return method(tensor, *args, **how)

        patch.setattr(torch.Tensor, name, noted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:  # item(), float(), bool(), in Python and in C++
            self.events.append(torch.tensor([float(out)]))
        return out


@pytest.mark.parametrize("recipe", [{"optimizer": "adamw"}, {"optimizer": "muon", "ema": 0.9}])
def test_loss_and_norm_of_a_step_are_read_while_the_next_one_runs(training, monkeypatch, recipe):
    """Between log lines, and nothing else is: a GPU would still be at work on the step."""
    settings = dict(**recipe, max_steps=24, model_fields={"dropout": 0.1})
    logged = [r for r in read_metrics(training.run(**settings)["run"] + "/metrics.jsonl") if "loss" in r]
    with monkeypatch.context() as patch:
        reads = Reads(patch)
        with reads:
            quiet = training.run(**settings, log_interval=8, resume="never")
    assert losses(quiet) == [logged[at]["loss"] for at in (0, 7, 15, 23)]
    starts = [at for at, event in enumerate(reads.events) if isinstance(event, str)]
    assert len(starts) == 24
    for step in range(2, 23):  # what was read after the backward pass of this step, before that of the next
        read = [tensor.tolist() for tensor in reads.events[starts[step - 1] + 1 : starts[step]]]
        before = logged[step - 2]
        if step % 8 == 7:  # and then the log line begins: it counts characters in its batch, which the host has made
            assert read[0] == [before["loss"], before["grad_norm"], 1.0]
        elif step % 8 and step > 2:
            # those of a step with a log line have been read for it
            assert read == ([] if step % 8 == 1 else [[before["loss"], before["grad_norm"], 1.0]]), step


def test_resume_modes(training, capsys):
    with pytest.raises(UserError, match="no run to resume: .* does not exist"):
        training.run(resume="must")
    first = training.run()
    capsys.readouterr()
    assert training.run() == first and "is finished" in capsys.readouterr().out
    assert (
        training.run(log_interval=2, max_batch_size=2, global_batch_size=4) == first
    )  # neutral settings make no new run
    assert training.run(max_lr=0.02)["run"].endswith("_2")
    assert "differs in max_lr: this run goes to" in capsys.readouterr().out
    assert training.run(max_lr=0.02)["run"].endswith("_2") and "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="--resume=must.*differs in max_lr"):
        training.run(max_lr=0.03, resume="must")
    longer = training.run(max_steps=8, resume=first["run"])
    assert longer["run"] == first["run"] and longer["steps"] == 8
    with pytest.raises(UserError, match="no run folder"):
        training.run(resume=str(training.path))
    with pytest.raises(UserError, match="another architecture"):
        training.run(resume=first["run"], model_fields={"dim": 8})


def test_a_bad_step_is_skipped_and_counted(training, monkeypatch, capsys):
    forward = TinyModel.forward

    def poisoned(at):
        calls = []

        def replacement(self, input_ids, targets=None, doc_ids=None):
            logits, loss, other_vars = forward(self, input_ids, targets, doc_ids)
            if self.training and targets is not None:
                calls.append(0)
                loss = loss * float("nan") if len(calls) in at else loss
            return logits, loss, other_vars

        return replacement

    monkeypatch.setattr(TinyModel, "forward", poisoned({3}))
    monkeypatch.setattr(TinyModel, "accepts", classmethod(lambda cls, name: name == "doc_ids"))
    summary = training.run()
    assert summary["skipped_steps"] == 1 and "step 3 skipped: loss nan" in capsys.readouterr().err
    assert all(torch.isfinite(value).all() for value in training.weights().values())
    monkeypatch.setattr(TinyModel, "forward", poisoned(set(range(1, 99))))
    with pytest.raises(UserError, match="10 steps in a row"):
        training.run(max_steps=30)


def test_one_process_per_run_folder(training, monkeypatch):
    stop_after(training, monkeypatch, 3)
    taken = lock_folder(training.path / "output/pretrain_tiny")
    with taken, pytest.raises(UserError, match="another process is training in"):
        training.run()
    assert training.run()["status"] == "finished"


def test_a_second_signal_ends_at_once():
    code = (
        "import os, signal, engine.training.stop_signal as s; s.ECHO_SECONDS = %s\nwith s.StopSignal() as stop:\n"
        "    os.kill(os.getpid(), 15); os.kill(os.getpid(), 15); print(stop.name)"
    )
    for echo, code_wanted, output in ((5, 0, "SIGTERM\n"), (-1, 143, "")):
        done = subprocess.run([sys.executable, "-c", code % echo], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout) == (code_wanted, output) and "saving at the next step" in done.stderr


def test_a_failed_save_does_not_end_the_run(training, monkeypatch, capsys):
    save = checkpoint_manager.save_checkpoint

    def full_disk(folder, *rest):
        if folder.name == "step-00000002":
            raise OSError("No space left on device")
        save(folder, *rest)

    monkeypatch.setattr(checkpoint_manager, "save_checkpoint", full_disk)
    monkeypatch.setattr(checkpoint_manager, "PAUSE_SECONDS", 0)
    assert training.run(save_interval=2)["status"] == "finished"
    assert "could not be saved (No space left" in capsys.readouterr().err


@pytest.mark.slow
def test_bf16_trains_fp32_weights(training):
    summary = training.run(precision="bf16", max_steps=30)
    assert losses(summary)[-1] < losses(summary)[0]
    assert {value.dtype for value in training.weights().values()} == {torch.float32}
    with pytest.raises(UserError, match="fp16 needs CUDA"):
        training.run(precision="fp16")


def test_tied_weights_train_and_resume(training, monkeypatch):
    tied = {"tied": True}
    uninterrupted = training.run(model_fields=tied, output_path=str(training.path / "uninterrupted"))
    expected = training.weights()
    stop_after(training, monkeypatch, 3, model_fields=tied)
    resumed = training.run(model_fields=tied)
    assert losses(resumed) == losses(uninterrupted) and same(training.weights(), expected)
    assert training.model.lm_head.weight is training.model.tok_embed.weight
    saved = load_file(os.path.join(resumed["run"], "final", "model.safetensors"))
    assert torch.equal(saved["tok_embed.weight"], expected["lm_head.weight"])
    torch.manual_seed(1337)
    assert not torch.equal(type(training.model)(training.model.args).lm_head.weight, expected["lm_head.weight"])


def test_a_model_without_doc_ids(training):
    class Plain(TinyModel):
        def forward(self, input_ids, targets=None):
            return super().forward(input_ids, targets)

    sequences = DocumentSequences(training.sequences.file, 32, pack=False)
    training.val = DocumentSequences(training.val.file, 32, pack=False)
    assert training.run(sequences=sequences, model_class=Plain, max_steps=3)["status"] == "finished"


@pytest.mark.slow
def test_compiled_equals_eager(training):
    eager = training.run(output_path=str(training.path / "eager"))
    compiled = training.run(compile="true")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)
