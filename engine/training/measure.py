"""--dry_run: measure one optimizer step, and estimate the run from it."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.data.loader import StepBatches, StepLoader
from engine.data.sequences import Sequences
from engine.distributed import process_group
from engine.planning import memory
from engine.planning.dry_run import MeasuredStep, dry_run, saved_bytes
from engine.planning.mfu import HardwarePeak, synchronize
from engine.training.batch_plan import BatchPlan
from engine.training.config import TrainConfig
from engine.training.run import log_plan
from engine.training.schedule import learning_rate
from engine.training.step import TrainStep
from model.basemodel import BaseModel
from utils.log import log

STEPS = 2  # the first one compiles and allocates the optimizer state; the second one is measured


def take_step(
    config: TrainConfig, model: BaseModel, step: TrainStep, work: StepBatches, index: int, total_steps: int
) -> int:
    """Take optimizer step `index` (0-based) as the loop does, without its logs; return its tokens on all processes."""
    step.optimizer.set_lr(learning_rate(index, total_steps, config))
    model.before_step(index, total_steps)
    targets, tokens = process_group.sum_numbers([sum(work.targets), work.tokens])
    values = step.accumulate(work, targets, config.seed, index)
    norm = step.clip()
    step.update(values["loss"].isfinite() & norm.isfinite())
    with torch.no_grad():
        model.after_step({name: value for name, value in values.items() if name != "loss"})
    return int(tokens)


def measure_step(
    config: TrainConfig, model: BaseModel, step: TrainStep, plan: BatchPlan, total_steps: int, data: Sequences
) -> MeasuredStep:
    """Take two optimizer steps of the full batch and measure the second. The weights change."""
    rank, processes = process_group.rank(), process_group.world_size()
    full = replace(plan, ramp_steps=0)
    loader = StepLoader(data, full, config.seed, 0, STEPS, rank, processes, trim=not step.compiled)
    activations = saved_bytes(model, loader.make(0).batches[0], step.device, step.autocast)
    for index in range(STEPS):
        work = loader.make(index)
        memory.reset_peak_memory(step.device)
        started = time.perf_counter()
        tokens = take_step(config, model, step, work, index, total_steps)
        synchronize(step.device)
        seconds = time.perf_counter() - started
    return MeasuredStep(tokens, seconds, memory.peak_memory(step.device), activations)


def estimate_run(
    config: TrainConfig,
    stage: str,
    folder: Path,
    model: BaseModel,
    step: TrainStep,
    plan: BatchPlan,
    total_steps: int,
    train_data: Sequences,
    val_data: Sequences | None,
) -> dict[str, Any]:
    """Measure a step, log what the run that would go to `folder` needs, and return the estimates."""
    title = f"{stage} {config.model_name}"
    peak = HardwarePeak(step.device, step.precision, config.peak_tflops)
    log_plan(title, model, step, plan, total_steps, train_data, peak)
    log("dry run: nothing is written")
    measured = measure_step(config, model, step, plan, total_steps, train_data)
    return dry_run(
        title, config, folder, model, step.optimizer, plan, total_steps, train_data, val_data, measured, peak
    )
