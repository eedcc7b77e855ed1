"""Learning rates as functions of the step."""

import pytest

from engine.config import TrainConfig, count_steps, plan_batch
from engine.schedule import learning_rate
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


def test_iters_go_before_ratios():
    assert rates(lr_schedule="cosine", warmup_iters=4, warmup_ratio=0.5)[4] == pytest.approx(1.0)
    assert rates(lr_schedule="cosine", lr_decay_iters=50)[50] == pytest.approx(0.1)


def test_steps_and_batches():
    assert count_steps(TrainConfig(epochs=2), rows=100, global_rows=8, seq_len=16) == 25
    assert count_steps(TrainConfig(max_tokens=1280), rows=100, global_rows=8, seq_len=16) == 10
    assert count_steps(TrainConfig(max_steps=3, max_tokens=1280), rows=100, global_rows=8, seq_len=16) == 3
    plan = plan_batch(TrainConfig(max_batch_size=6, global_batch_size=16))
    assert (plan.global_rows, plan.micro_rows, plan.accumulation) == (16, 4, 4)
    plan = plan_batch(TrainConfig(max_batch_size=6, accumulation_steps=3))
    assert (plan.global_rows, plan.micro_rows, plan.accumulation) == (18, 6, 3)


@pytest.mark.parametrize("fields", [{"max_batch_size": 0}, {"warmup_ratio": 1.5}, {"epochs": 0},
                                    {"min_lr": 1.0, "max_lr": 0.1}])
def test_senseless_settings_are_refused(fields):
    with pytest.raises(UserError):
        TrainConfig(**fields)
