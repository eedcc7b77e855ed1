"""--max_minutes: minutes become steps once, before the first one, and the run is then exact."""

import itertools
import json
import os
import signal

import pytest
import torch
import yaml

from engine.runs.metrics import read_metrics
from engine.training import budget, loop
from engine.training.batch_plan import plan_run
from engine.training.budget import Costs, seconds_of, steps_within
from engine.training.config import TrainConfig
from tests.support.runs import losses, same, stop_after
from tests.support.tiny_model import TinyModel
from tests.support.torchrun import figures, sft_folder
from tests.support.torchrun import train as train_by_torchrun
from utils.errors import UserError

COSTS = Costs(training=0.01, evaluation=0.004, samples=0.5, save=0.25)  # per sequence, twice; all prompts; a checkpoint
NO_STEPS = dict(max_steps=0, max_minutes=1.0)


class Held:
    """A held-out set of 100 sequences."""

    def __len__(self):
        return 100


def settings_of(summary):
    with open(os.path.join(summary["run"], "config.yaml"), encoding="utf-8") as file:
        return yaml.safe_load(file)


@pytest.fixture
def measured(monkeypatch):
    """What the next runs measure: a list whose last element counts; with how often they did."""
    costs = [Costs(training=0.5, evaluation=0.01, samples=0.1, save=0.1)]
    calls = []
    monkeypatch.setattr(budget, "measure", lambda *_: calls.append(1) or costs[-1])
    monkeypatch.setattr(budget, "passed", lambda config: 0.0)
    return costs, calls


# ------------------------------------------------------------------------------------------------ the arithmetic


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"eval_interval": 0, "sample_interval": 0, "save_interval": 0},
        {"eval_interval": 7, "eval_batches": 2, "eval_final_batches": 3},
        {"sample_interval": 11, "save_interval": 3},
        {"batch_ramp_ratio": 0.5},
        {"global_batch_size": 32, "batch_ramp_ratio": 1.0, "eval_interval": 5},
    ],
)
def test_the_most_steps_that_fit_with_all_that_happens_between_them(fields):
    config = TrainConfig(**{"max_batch_size": 8, **fields})
    for seconds in (5.0, 20.0, 333.0):
        steps = steps_within(seconds, config, COSTS, 16, Held())
        assert seconds_of(steps, config, COSTS, 16, Held()) <= seconds or steps == 0
        assert seconds_of(steps + 1, config, COSTS, 16, Held()) > seconds
    assert steps > 100


def test_the_seconds_of_a_run_are_the_sum_of_its_parts():
    config = TrainConfig(max_batch_size=8, eval_interval=10, eval_batches=2, eval_final_batches=5, sample_interval=25,
                         save_interval=20)  # fmt: skip
    evaluations = 5 * 16 + 40  # after steps 10 to 50, not after the last one, 60
    expected = 60 * 8 * 0.01 + evaluations * 0.004 + (1 + 2) * 0.5 + (2 + 2) * 0.25
    assert seconds_of(60, config, COSTS, 16, Held()) == pytest.approx(expected)
    assert seconds_of(60, config, COSTS, 16, None) == pytest.approx(expected - evaluations * 0.004)
    after = 1 * 16 + 40  # resumed at step 45
    expected = 15 * 8 * 0.01 + after * 0.004 + (1 + 1) * 0.5 + 2 * 0.25
    assert seconds_of(60, config, COSTS, 16, Held(), done=45) == pytest.approx(expected)


def test_a_limit_is_kept_and_a_budget_without_a_step_is_no_step():
    config = TrainConfig(max_batch_size=8)
    assert steps_within(1e9, config, COSTS, 16, Held(), limit=50) == 50
    assert steps_within(2.0, config, COSTS, 16, Held(), limit=10**9) == steps_within(2.0, config, COSTS, 16, Held())
    assert steps_within(-5.0, config, COSTS, 16, Held()) == 0
    assert steps_within(0.0, config, COSTS, 16, Held(), done=7) == 7


# ------------------------------------------------------------------------------------------------ the run


def test_the_steps_are_written_before_the_first_one_and_decide_the_schedule(training, measured):
    seen = []

    class Watching(TinyModel):
        def before_step(self, step, total_steps):
            config = training.path / "output/pretrain_tiny/config.yaml"
            seen.append((step, total_steps, yaml.safe_load(config.read_text(encoding="utf-8"))["max_steps"]))

    summary = training.run(model_class=Watching, **NO_STEPS)
    steps = summary["steps"]
    assert seen == [(step, steps, steps) for step in range(steps)] and 20 < steps < 30  # 56 seconds at 2 per step
    settings = settings_of(summary)
    assert (settings["max_minutes"], settings["max_tokens"]) == (1.0, steps * 4 * 32)
    identity = json.loads((training.path / "output/pretrain_tiny/run.json").read_text())["identity"]
    assert identity["max_minutes"] == 1 and "steps" not in identity and identity["max_steps"] == 0
    curve, weights = losses(summary), training.weights()
    by_steps = training.run(max_steps=steps, run_name="by_steps")
    assert losses(by_steps) == curve and same(weights, training.weights())


def test_an_interrupted_run_keeps_its_steps_on_another_machine(training, measured, monkeypatch):
    costs, calls = measured
    uninterrupted = training.run(**NO_STEPS, model_fields={"dropout": 0.1}, output_path=str(training.path / "first"))
    weights = training.weights()
    half = stop_after(training, monkeypatch, 3, **NO_STEPS, model_fields={"dropout": 0.1})
    assert half["steps"] == 3 and len(calls) == 2
    costs.append(costs[0]._replace(training=5.0))
    rest = training.run(**NO_STEPS, model_fields={"dropout": 0.1})
    assert rest["run"] == half["run"] and rest["steps"] == uninterrupted["steps"] and len(calls) == 2
    assert losses(rest) == losses(uninterrupted) and same(weights, training.weights())
    assert training.run(**NO_STEPS, model_fields={"dropout": 0.1}) == rest  # finished: nothing to do
    other = training.run(max_steps=0, max_minutes=2.0, model_fields={"dropout": 0.1})
    assert other["run"] != rest["run"] and 0 < other["steps"] < rest["steps"]  # another budget is another run


def test_a_run_killed_before_its_first_checkpoint_keeps_its_steps(training, measured, monkeypatch):
    costs, calls = measured

    class Killed(BaseException):
        pass

    def before_step(self, step, total_steps):
        if step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(TinyModel, "before_step", before_step)
        with pytest.raises(Killed):
            training.run(**NO_STEPS)
    steps = yaml.safe_load((training.path / "output/pretrain_tiny/config.yaml").read_text())["max_steps"]
    costs.append(costs[0]._replace(training=5.0))
    assert training.run(**NO_STEPS)["steps"] == steps and len(calls) == 1


def test_minutes_given_to_resume_count_from_the_checkpoint(training, measured, monkeypatch):
    half = stop_after(training, monkeypatch, 3, max_steps=1000)
    more = training.run(max_steps=0, max_minutes=1.0, resume=half["run"])
    assert more["run"] == half["run"] and more["steps"] > 3 + 20
    fresh = training.run(max_steps=0, max_minutes=1.0, dry_run=True)
    assert more["steps"] == fresh["steps"] + 3
    records = read_metrics(more["run"] + "/metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, more["steps"] + 1))


def test_max_steps_and_max_tokens_are_limits_and_epochs_are_not(training, measured, capsys):
    minute = dict(max_minutes=1.0, dry_run=True)
    assert training.run(**minute, max_steps=5)["steps"] == 5
    assert "5 steps, the most that --max_steps or --max_tokens allows" in capsys.readouterr().out
    assert training.run(**minute, max_steps=0, max_tokens=7 * 4 * 32)["steps"] == 7
    unlimited = training.run(**minute, max_steps=0, epochs=0.01)["steps"]
    assert unlimited > plan_run(TrainConfig(epochs=0.01, max_batch_size=4), len(training.sequences), 32)[1]
    assert unlimited == training.run(**minute, max_steps=1000)["steps"]


@pytest.mark.parametrize(
    "costs",
    [
        Costs(training=100.0, evaluation=0.0, samples=0.0, save=0.0),
        Costs(training=0.1, evaluation=50.0, samples=0.0, save=0.0),
        Costs(training=0.1, evaluation=0.0, samples=0.0, save=40.0),
    ],
)
def test_a_budget_that_cannot_be_kept_is_one_line_and_leaves_no_folder(training, measured, costs):
    measured[0].append(costs)
    with pytest.raises(UserError, match="--max_minutes=1 is too short: .* give more than") as caught:
        training.run(**NO_STEPS)
    assert "\n" not in str(caught.value) and not (training.path / "output/pretrain_tiny").exists()
    needed = float(str(caught.value).split("give more than ")[1].split(" minutes")[0])
    assert training.run(max_steps=0, max_minutes=1.1 * needed, dry_run=True)["steps"] >= 1


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_budget_that_is_no_time_is_refused(value):
    with pytest.raises(UserError, match="--max_minutes"):
        TrainConfig(max_minutes=value)


def test_a_dry_run_shows_the_steps_that_fit(training, measured):
    about = training.run(dry_run=True, **NO_STEPS)
    assert 20 < about["steps"] < 30 and about["tokens"] == about["steps"] * 4 * 32
    assert not (training.path / "output").exists()


# ------------------------------------------------------------------------------------------------ the measurement


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ema": 0.9, "batch_ramp_ratio": 0.5, "global_batch_size": 8},
        pytest.param({"optimizer": "adamw"}, marks=pytest.mark.slow),
        pytest.param({"max_batch_size": 0, "global_batch_size": 4}, marks=pytest.mark.slow),
    ],
)
def test_measured_steps_change_nothing(training, monkeypatch, fields):
    settings = dict(max_steps=6, model_fields={"dropout": 0.1}, eval_interval=3, **fields)
    plain = training.run(**settings)
    weights = training.weights()
    taken = []
    take_step = budget.take_step
    monkeypatch.setattr(budget, "take_step", lambda *args: taken.append(1) or take_step(*args))
    monkeypatch.setattr(budget, "MEASURED", 0.0)  # one step, after those that do not count
    budgeted = training.run(**settings, max_minutes=60, run_name="budgeted")
    assert len(taken) >= 3 and budgeted["steps"] == 6
    assert losses(budgeted) == losses(plain) and losses(budgeted, "val_loss") == losses(plain, "val_loss")
    assert same(weights, training.weights()) and weights["bias"].abs().sum() > 0  # a buffer that steps move


def test_restored_are_weights_buffers_gradients_and_the_optimizer(training):
    config = TrainConfig(max_batch_size=4, max_lr=0.01)
    training.run(max_steps=1)
    model = training.model
    step = loop.TrainStep(model, config, torch.device("cpu"))
    before = training.weights()
    with budget.unchanged(model, step, config):
        optimizer = step.optimizer
        budget.training_seconds(config, model, step, training.sequences)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(1)
    assert same(before, training.weights()) and step.optimizer is not optimizer
    assert all(not part.state for part in step.optimizer.all) and all(p.grad is None for p in model.parameters())


def test_the_first_steps_do_not_count_and_one_slow_window_does_not(training, monkeypatch):
    """By a clock that moves with the steps: the first takes a minute, one in the middle ten seconds, the others one."""
    clock, taken = [0.0], itertools.count()

    def take_step(*_):
        index = next(taken)
        clock[0] += {0: 60.0, 4: 10.0}.get(index, 1.0)

    monkeypatch.setattr(budget, "take_step", take_step)
    monkeypatch.setattr(budget.time, "perf_counter", lambda: clock[0])
    config = TrainConfig(max_batch_size=4, max_minutes=10.0)
    assert budget.training_seconds(config, training, FakeStep(), training.sequences) == pytest.approx(1 / 4)
    steps = next(taken)
    assert 60 * 10 * budget.MEASURED * 0.5 <= steps - 2 <= 60 * 10 * budget.MEASURED
    config = TrainConfig(max_batch_size=4, max_minutes=0.01)  # no time to measure more than one
    assert budget.training_seconds(config, training, FakeStep(), training.sequences) == pytest.approx(1 / 4)


class FakeStep:
    device = torch.device("cpu")
    compiled = False


def test_a_signal_during_the_measurement_leaves_nothing(training, monkeypatch):
    monkeypatch.setattr(budget, "measure", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        training.run(**NO_STEPS)
    assert not (training.path / "output/pretrain_tiny").exists()


@pytest.mark.slow
def test_by_the_real_clock_a_longer_budget_trains_more(training):
    short = training.run(max_steps=0, max_minutes=0.1, log_interval=1000)
    long = training.run(max_steps=0, max_minutes=0.4, log_interval=1000)
    assert short["status"] == long["status"] == "finished" and 1 < 2 * short["steps"] < long["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_take_the_steps_that_the_first_one_measured(tmp_path, parallel):
    """And the run is that of as many steps, to the bit."""
    folder = sft_folder(tmp_path)
    settings = dict(parallel=parallel, eval_interval=0)
    found, weights, output = train_by_torchrun(folder, 2, "minutes", max_minutes=0.3, max_steps=0, **settings)
    steps = found[-1]["step"]
    assert steps > 3 and f"--max_minutes=0.3: {steps} steps" in output and weights is not None
    plain, plain_weights, _ = train_by_torchrun(folder, 2, "steps", max_steps=steps, **settings)
    assert figures(found) == figures(plain) and same(weights, plain_weights)
