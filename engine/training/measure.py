"""Measure one optimizer step, for --dry_run: its time and memory."""

import time
from dataclasses import replace

import torch

from engine.data.loader import StepLoader
from engine.data.sequences import Sequences
from engine.distributed import process_group
from engine.planning import memory
from engine.planning.dry_run import MeasuredStep, saved_bytes
from engine.planning.mfu import synchronize
from engine.training.batch_plan import BatchPlan
from engine.training.config import TrainConfig
from engine.training.schedule import learning_rate
from engine.training.step import TrainStep
from model.basemodel import BaseModel

STEPS = 2  # the first one compiles and allocates the optimizer state; the second one is measured


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
        step.optimizer.set_lr(learning_rate(index, total_steps, config))
        model.before_step(index, total_steps)
        targets, tokens = process_group.sum_numbers([sum(work.targets), work.tokens])
        values = step.accumulate(work, targets, config.seed, index)
        norm = step.clip()
        step.update(values["loss"].isfinite() & norm.isfinite())
        with torch.no_grad():
            model.after_step({name: value for name, value in values.items() if name != "loss"})
        synchronize(step.device)
        seconds = time.perf_counter() - started
    return MeasuredStep(int(tokens), seconds, memory.peak_memory(step.device), activations)
