"""Learning rates as functions of the step."""

import pytest

from engine.training.batch_plan import plan_batch, plan_run
from engine.training.config import TrainConfig
from engine.training.schedule import learning_rate
from utils.errors import UserError


def rates(total=100, **fields):
    config = TrainConfig(max_lr=1.0, min_lr=0.1, **fields)
    return [learning_rate(step, total, config) for step in range(total)]


def test_cosine():
    lr = rates(lr_schedule="cosine", warmup_iters=10, lr_decay_ratio=0.9)
    assert lr[0] == pytest.approx(0.1) and lr[9] == pytest.approx(1.0) and lr[10] == pytest.approx(1.0)
    assert lr[50] == pytest.approx(0.55) and lr[90] == lr[99] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(lr[10:], lr[11:]))


def test_wsd():
    lr = rates(lr_schedule="wsd", warmup_ratio=0.05, wsd_decay_ratio=0.2)
    assert lr[4] == lr[79] == lr[80] == 1.0 and lr[81] < 1.0
    assert lr[90] == pytest.approx(0.55) and lr[99] == pytest.approx(0.145)


def test_constant_and_no_warmup():
    assert rates(lr_schedule="constant", warmup_ratio=0.0) == [1.0] * 100
    assert rates(lr_schedule="cosine", warmup_ratio=0.0)[0] == 1.0


def test_iters_override_ratios():
    assert rates(lr_schedule="cosine", warmup_iters=4, warmup_ratio=0.5)[4] == pytest.approx(1.0)
    assert rates(lr_schedule="cosine", lr_decay_iters=50)[50] == pytest.approx(0.1)


def test_steps_and_batches():
    for fields, steps in (({"epochs": 2}, 25), ({"max_tokens": 1280}, 10), ({"max_steps": 3, "max_tokens": 1280}, 3)):
        config = TrainConfig(max_batch_size=8, **fields)
        assert plan_run(config, sequences=100, seq_len=16)[1] == steps
    for fields, wanted in (
        ({"global_batch_size": 16}, (16, 4, 4)),
        ({"accumulation_steps": 3}, (18, 6, 3)),
        ({"global_batch_tokens": 16 * 16 + 5}, (16, 4, 4)),
        ({"global_batch_tokens": 16 * 976, "max_batch_size": 16}, (960, 16, 60)),
        ({"global_batch_tokens": 3}, (1, 1, 1)),
    ):
        plan = plan_batch(TrainConfig(**{"max_batch_size": 6, **fields}), 16)
        assert (plan.global_sequences, plan.micro_sequences, plan.accumulation) == wanted


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_a_ramp_computes_where_every_step_begins(ratio):
    config = TrainConfig(global_batch_size=16, max_batch_size=3, max_tokens=16 * 16 * 40, batch_ramp_ratio=ratio)
    plan, steps = plan_run(config, sequences=100, seq_len=16)
    sizes = [plan.sequences_at(step) for step in range(steps)]
    assert sizes == sorted(sizes) and set(sizes) <= {4, 8, 16}
    assert [plan.sequences_before(step) for step in range(steps + 1)] == [sum(sizes[:s]) for s in range(steps + 1)]
    assert sum(size < 16 for size in sizes) == plan.ramp_steps == round(ratio * steps)
    assert 16 * 40 - 16 < sum(sizes) <= 16 * 40 + 8  # the tokens asked for, to a step, whatever the ramp
    micro = [plan.micro_sequences_at(step) for step in range(steps)]
    assert all(size % part == 0 and part <= 3 for size, part in zip(sizes, micro))


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr("engine.distributed.process_group.world_size", lambda: 3)
    with pytest.raises(UserError, match="a step of 16 sequences cannot be divided evenly among 3 .* multiple of 3"):
        plan_batch(TrainConfig(global_batch_size=16), 16)
    with pytest.raises(UserError, match="in quarters for --batch_ramp_ratio: .* multiple of 12"):
        plan_batch(TrainConfig(global_batch_size=18, batch_ramp_ratio=0.1), 16)


@pytest.mark.parametrize(
    "fields",
    [
        {"accumulation_steps": 0},
        {"betas": (0.9, 1.5)},
        {"seed": 2**63},
        {"max_batch_size": 0},
        {"warmup_ratio": 1.5},
        {"epochs": 0},
        {"min_lr": 1.0, "max_lr": 0.1},
        {"ema": 1.0},
        {"batch_ramp_ratio": 2.0},
        {"z_loss": -1.0},
        {"global_batch_size": 8, "global_batch_tokens": 80},
    ],
)
def test_invalid_settings_are_refused(fields):
    with pytest.raises(UserError):
        TrainConfig(**fields)
