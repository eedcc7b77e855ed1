"""--max_minutes: the optimizer steps that fit a budget of minutes, measured before the first one.

The result is written into the run's config.yaml as max_steps, and a resumed run takes it from there: the schedule, the
order of the data and so the run are a function of it, and no longer of the clock.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import NamedTuple

import torch

from engine.data.loader import StepLoader
from engine.data.sequences import DocumentSequences, Sequences
from engine.distributed import fsdp, process_group
from engine.planning.dry_run import evaluated_sequences, times_between
from engine.planning.mfu import synchronize
from engine.runs.checkpoint import step_of
from engine.runs.checkpoint_manager import checkpoint_bytes
from engine.runs.run_folder import RunDirectory, resolved
from engine.training.batch_plan import plan_batch, plan_run, ramped
from engine.training.config import TrainConfig
from engine.training.evaluate import held_out_loss
from engine.training.measure import take_step
from engine.training.run import PROMPTS
from engine.training.samples import write_samples
from engine.training.step import TrainStep
from model.basemodel import BaseModel
from utils.errors import UserError
from utils.log import format_count, log
from utils.tokenizer import Tokenizer

RESERVE = 0.06  # of the budget: starting Python, TensorBoard and matplotlib, and steps that become slower
MEASURED = 0.03  # of the budget is spent on measured steps
WINDOWS = 5  # the measured steps are timed in so many windows, and the median counts: a pause of the system does not
LARGEST_WINDOW = 50
DISK = 200e6  # bytes per second of a checkpoint, which is hashed, written and synced
NEVER_ENDS = 2**40  # steps, for a loader that is closed early


class Costs(NamedTuple):
    """Measured seconds of the parts of a run."""

    training: float  # per sequence, over all processes
    evaluation: float  # of a held-out sequence
    samples: float  # of all prompts
    save: float  # of a checkpoint


def resolve_minutes(
    config: TrainConfig,
    directory: RunDirectory,
    model: BaseModel,
    step: TrainStep,
    tokenizer: Tokenizer,
    train_data: Sequences,
    val_data: DocumentSequences | None,
) -> None:
    """Set config.max_steps and config.max_tokens to what fits config.max_minutes; equal on all processes.

    A run that has begun keeps its steps. Else they are measured: the minutes count from the reading of the settings,
    so that loading, compiling and measuring are part of them. Afterwards weights, buffers and optimizer are as before.
    UserError: not one step fits.
    """
    n_sequences, seq_len = len(train_data), train_data.seq_len
    steps = resolved(directory.folder, "max_steps") if directory.same else 0
    if not steps:
        done = step_of(directory.checkpoint) if directory.checkpoint else 0
        limit = plan_run(config, n_sequences, seq_len)[1] if config.max_steps or config.max_tokens else None
        with unchanged(model, step, config):
            costs = measure(config, model, step, tokenizer, train_data, val_data)
        left = 60 * config.max_minutes * (1 - RESERVE) - passed(config)
        steps = process_group.broadcast_object(steps_within(left, config, costs, seq_len, val_data, done, limit))
        if steps <= done:
            raise UserError(too_short(config, costs, seq_len, val_data, done))
        rate = seq_len / costs.training
        limited = ", the most that --max_steps or --max_tokens allows" if steps == limit else ""
        log(f"--max_minutes={config.max_minutes:g}: {steps} steps{limited}, measured at {format_count(rate)} tokens/s")
    config.max_steps = steps
    plan, _ = plan_run(config, n_sequences, seq_len)
    config.max_tokens = plan.sequences_before(steps) * seq_len


def steps_within(
    seconds: float,
    config: TrainConfig,
    costs: Costs,
    seq_len: int,
    val_data: Sequences | None,
    done: int = 0,
    limit: int | None = None,
) -> int:
    """The most steps, at most `limit`, of a run whose part after step `done` takes `seconds`; `done` when none fit."""

    def fits(steps: int) -> bool:
        return seconds_of(steps, config, costs, seq_len, val_data, done) <= seconds

    if limit is not None and (limit <= done or fits(limit)):
        return limit
    low, high = done, done + 1
    while fits(high):  # it ends: every step takes time
        low, high = high, done + 2 * (high - done)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def seconds_of(
    steps: int, config: TrainConfig, costs: Costs, seq_len: int, val_data: Sequences | None, done: int = 0
) -> float:
    """What a run of `steps` steps takes after step `done`, with its evaluations, samples and checkpoints."""
    plan = ramped(plan_batch(config, seq_len), config, steps)
    training = (plan.sequences_before(steps) - plan.sequences_before(done)) * costs.training
    evaluation = evaluated_sequences(config, plan, steps, val_data, done) * costs.evaluation
    samples = (1 + times_between(done, steps, config.sample_interval)) * costs.samples
    saves = (2 + times_between(done, steps, config.save_interval)) * costs.save  # the last step's, and final/
    return training + evaluation + samples + saves


def too_short(config: TrainConfig, costs: Costs, seq_len: int, val_data: Sequences | None, done: int) -> str:
    """The message for a budget in which no step fits."""
    one = seconds_of(done + 1, config, costs, seq_len, val_data, done)
    needed = (one + passed(config)) / (1 - RESERVE) / 60
    return (
        f"--max_minutes={config.max_minutes:g} is too short: {passed(config):.1f} s have passed, and one step with the "
        f"evaluation, samples and checkpoint after it takes {one:.1f} s: give more than "
        f"{needed:.2g} minutes, or evaluate less by --eval_final_batches"
    )


def measure(
    config: TrainConfig,
    model: BaseModel,
    step: TrainStep,
    tokenizer: Tokenizer,
    train_data: Sequences,
    val_data: DocumentSequences | None,
) -> Costs:
    """Measure the parts of a run, each after it has run once. Weights, buffers and the optimizer's state change."""
    training = training_seconds(config, model, step, train_data)
    evaluation = samples = 0.0
    if val_data is not None:
        evaluation = evaluation_seconds(config, model, step, tokenizer, train_data.seq_len, val_data)
        samples = sampling_seconds(config, model, step, tokenizer, val_data)
    _, checkpoint = checkpoint_bytes(model, step.optimizer)
    return Costs(training, evaluation, samples, checkpoint / DISK)


def training_seconds(config: TrainConfig, model: BaseModel, step: TrainStep, data: Sequences) -> float:
    """Seconds per sequence of warm optimizer steps of the full batch, all processes together."""
    ramp = bool(config.batch_ramp_ratio)
    plan = replace(plan_batch(config, data.seq_len), ramp_steps=2 * ramp)  # a quarter, half, and then the full batch
    rank, processes = process_group.rank(), process_group.world_size()
    pin, trim = step.device.type == "cuda", not step.compiled
    loader = StepLoader(data, plan, config.seed, 0, NEVER_ENDS, rank, processes, pin=pin, trim=trim)
    with closing(loader):
        works = enumerate(loader)

        def window(steps: int) -> float:
            started = time.perf_counter()
            for index, work in islice(works, steps):
                take_step(config, model, step, work, index, NEVER_ENDS)  # still warming up: hardly any learning rate
            synchronize(step.device)
            return time.perf_counter() - started

        window(1 + plan.ramp_steps)  # compiles, and allocates the optimizer's state
        fit = int(60 * MEASURED * config.max_minutes / max(window(1), 1e-6))
        fit = process_group.broadcast_object(fit)
        size = min(LARGEST_WINDOW, max(1, fit // WINDOWS))
        seconds = median(window(size) for _ in range(min(WINDOWS, max(1, fit))))
    return seconds / size / plan.global_sequences


def evaluation_seconds(
    config: TrainConfig,
    model: BaseModel,
    step: TrainStep,
    tokenizer: Tokenizer,
    seq_len: int,
    val_data: DocumentSequences,
) -> float:
    """Seconds per sequence of the held-out loss, all processes together."""
    size = plan_batch(config, seq_len).micro_sequences
    batch = size * process_group.world_size()

    def evaluate() -> None:
        held_out_loss(
            model,
            step.forward,
            val_data,
            tokenizer.characters,
            size,
            batch,
            step.device,
            step.compute_dtype,
            trim=not step.compiled,
        )
        fsdp.reshard(model)

    evaluate()  # compiles
    return median(timed(evaluate) for _ in range(3)) / min(batch, len(val_data))


def sampling_seconds(
    config: TrainConfig, model: BaseModel, step: TrainStep, tokenizer: Tokenizer, val_data: DocumentSequences
) -> float:
    """Seconds of a continuation, times the prompts; 0 on a process that writes none."""
    prompts = val_data.prompts(PROMPTS) if process_group.is_main() or step.sharded else []
    if not prompts:
        return 0.0

    def sample() -> None:
        with fsdp.broadcast_logits(model):
            write_samples(None, 0, model, tokenizer, prompts[:1], step.compute_dtype, config.seed)
        fsdp.reshard(model)

    return timed(sample) * len(prompts)


def passed(config: TrainConfig) -> float:
    """The seconds of the budget that are gone."""
    return time.monotonic() - config.started


def timed(function: Callable[[], None]) -> float:
    """The seconds of a call that ends when the device has finished."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@contextmanager
def unchanged(model: BaseModel, step: TrainStep, config: TrainConfig) -> Iterator[None]:
    """A context for steps that do not count: afterwards the weights, buffers and the optimizer are as before it."""
    tensors = [*model.parameters(), *model.buffers()]
    saved = [fsdp.local(tensor).detach().to("cpu", copy=True) for tensor in tensors]
    try:
        yield
    finally:
        fsdp.reshard(model)
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                fsdp.local(tensor).copy_(value)
        step.reset(model, config)
