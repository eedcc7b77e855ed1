"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from engine.training.config import TrainConfig


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Steps of linear warmup: `warmup_iters` when given, else `warmup_ratio` of the run."""
    return config.warmup_iters if config.warmup_iters > 0 else round(config.warmup_ratio * total_steps)


def decay_end(config: TrainConfig, total_steps: int) -> int:
    """The step at which the rate is `min_lr`: `lr_decay_iters` when given, else `lr_decay_ratio` of the run."""
    return config.lr_decay_iters if config.lr_decay_iters > 0 else round(config.lr_decay_ratio * total_steps)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of step `step` (0-based) of `total_steps`.

    Every schedule rises linearly over the warmup, and its first step is already above zero. Then `cosine` falls to
    `min_lr` along half a cosine (Loshchilov and Hutter, SGDR); `wsd` stays at `max_lr` and falls linearly over the last
    `wsd_decay_ratio` of the run (warmup-stable-decay, MiniCPM section 4); `constant` stays. After the end of the decay
    the rate is `min_lr`.
    """
    warmup = warmup_steps(config, total_steps)
    end = decay_end(config, total_steps)
    if step < warmup:
        return config.max_lr * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.max_lr
    if step >= end:
        return config.min_lr
    start = warmup if config.lr_schedule == "cosine" else max(warmup, end - round(config.wsd_decay_ratio * end))
    if step < start:
        return config.max_lr
    done = (step - start) / max(1, end - start)
    share = 0.5 * (1 + math.cos(math.pi * done)) if config.lr_schedule == "cosine" else 1 - done
    return config.min_lr + (config.max_lr - config.min_lr) * share
