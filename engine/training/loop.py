"""The only training loop. Every stage goes through train(), and it knows the model by its contract alone."""

import json
import time
from contextlib import closing
from typing import Any

import torch

from engine.data.sequences import DocumentSequences, Sequences
from engine.distributed import process_group
from engine.planning.batch_size import find_max_batch_size
from engine.runs.run_folder import (
    choose_run_directory,
    remove_if_empty_on_error,
    resolved,
    run_fingerprint,
)
from engine.training.batch_plan import plan_run
from engine.training.budget import resolve_minutes
from engine.training.build import model_facts
from engine.training.config import TrainConfig
from engine.training.evaluate import characters_of
from engine.training.measure import estimate_run
from engine.training.run import TrainRun, bits_per_character, place_model, restore_state, run_precision, set_up
from engine.training.schedule import learning_rate
from engine.training.step import TrainStep
from engine.training.stop_signal import StopSignal
from model.basemodel import BaseModel
from utils.atomic import write_text
from utils.log import format_count, format_seconds, log
from utils.tokenizer import Tokenizer


def train(
    config: TrainConfig,
    stage: str,
    model: BaseModel,
    tokenizer: Tokenizer,
    train_data: Sequences,
    val_data: DocumentSequences | None,
    next_command: str,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train `model` on `train_data` and return the run's summary (also written to summary.json).

    train_data, val_data: see engine/data/sequences.py. next_command: the command of the next stage, with {run} for the
    run folder. facts: further inputs of the run (e.g. the initial weights), as JSON values. With
    config.dry_run nothing is trained, and the estimates of the dry run are returned.
    UserError: settings that cannot work, or a run whose loss has become non-finite.
    """
    # ---------------------------------------------------------------- 1. the run's fingerprint and directory
    device = process_group.init(config.device)
    plan, total_steps = plan_run(config, len(train_data), train_data.seq_len)
    inputs = {
        **model_facts(model),
        "stage": stage,
        "global_batch_size": plan.global_sequences,
        # the minutes become steps below, and a resumed run takes those of its config.yaml
        **({"max_minutes": config.max_minutes} if config.max_minutes else {"steps": total_steps}),
        "data": train_data.file.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        **(facts or {}),
    }
    fingerprint = run_fingerprint(config, inputs)
    directory = choose_run_directory(config, stage, fingerprint)
    next_command = next_command.format(run=directory.folder)
    if directory.summary is not None:
        log(f"{directory.folder} is finished: nothing to do (--resume=never trains again). Next: {next_command}")
        return directory.summary

    # ---------------------------------------------------------------- 2. model and optimizer
    config.precision = run_precision(config, directory, model, device)  # resolved, for config.yaml
    place_model(config, model, device)
    step = TrainStep(model, config, device)

    # ---------------------------------------------------------------- 3. what is measured before the first step
    # The results go to config.yaml, from which a resumed run takes them
    if not config.max_batch_size or config.dry_run:
        model.before_step(0, total_steps)  # both run forward passes
    if not config.max_batch_size:
        config.max_batch_size = (directory.checkpoint and resolved(directory.folder, "max_batch_size")) or (
            find_max_batch_size(plan.micro_sequences, model, step.optimizer, train_data, device, step.autocast)
        )
    if config.max_minutes:
        resolve_minutes(config, directory, model, step, tokenizer, train_data, val_data)
    if config.dry_run:
        plan, total_steps = plan_run(config, len(train_data), train_data.seq_len)
        return estimate_run(config, stage, directory.folder, model, step, plan, total_steps, train_data, val_data)

    # ---------------------------------------------------------------- 4. the run
    state = restore_state(directory.checkpoint, model, step)
    run = set_up(config, stage, model, step, state, tokenizer, train_data, val_data, directory, fingerprint)
    with (
        remove_if_empty_on_error(run.folder),
        StopSignal() as stop,
        closing(run.loader),
        closing(run.progress),
        run.bad_steps,
    ):
        loop(run, stop)
        finish(run, stop)
    return summarize(run, next_command)


def loop(run: TrainRun, stop: StopSignal) -> None:
    """Take the optimizer steps from run.state on, until all are taken or any process has received a signal."""
    config, model, step, state = run.config, run.model, run.step, run.state
    since_log = [0.0, 0.0]  # tokens and seconds of training alone, since the last log line
    for work in run.loader:
        started = time.perf_counter()
        index = state["step"]
        done = index + 1
        last = done == run.total_steps
        logged = done % config.log_interval == 0 or last or done == 1

        # Everything derives from the step's index, random seeds included, so no scheduler or generator state is saved
        lr = learning_rate(index, run.total_steps, config)
        step.optimizer.set_lr(lr)
        model.before_step(index, run.total_steps)
        run.bad_steps.snapshot_buffers()
        if logged:
            run.diagnostics.watch()

        # Forward and backward, over all micro-batches and processes
        written = characters_of(run.tokenizer.characters, work.batches) if logged else 0
        targets, tokens, stopping, characters = process_group.sum_numbers(
            [sum(work.targets), work.tokens, stop.wanted, written]
        )
        values = step.accumulate(work, targets, config.seed, index)
        other_vars = {name: value for name, value in values.items() if name != "loss"}
        if logged:
            run.diagnostics.before_update()

        # Clip and update. The device skips a bad step; the host reads that one step later, so it never waits here
        norm = step.clip()
        good = run.bad_steps.check(values["loss"], norm, done, work.epoch, work.sequences)
        step.update(good)
        with torch.no_grad():
            model.after_step(other_vars)
        run.bad_steps.restore_buffers(good)

        # Log
        if logged:
            loss_value, norm_value = run.bad_steps.read()
        seconds = time.perf_counter() - started
        state["step"] = done
        state["tokens"] += int(tokens)
        state["seconds"] += seconds
        since_log = [since_log[0] + tokens, since_log[1] + seconds]
        text = None
        if logged:
            cross_entropy = values.get("loss/ce", values["loss"]).item()
            record = {
                "step": done,
                "tokens": state["tokens"],
                "loss": loss_value,
                "lr": lr,
                "bpc": bits_per_character(cross_entropy, targets, characters),
                "grad_norm": norm_value,
                "tokens_per_s": round(since_log[0] / max(since_log[1], 1e-9), 1),
                "mfu": run.mfu(*since_log),
            }
            text = run.log_step(record, other_vars)
            since_log = [0.0, 0.0]
        run.progress.update(done, text)

        # Evaluate, sample, save
        if run.val_data is not None and config.eval_interval and done % config.eval_interval == 0 and not last:
            run.evaluate(config.eval_batches)
        if config.sample_interval and done % config.sample_interval == 0 and not last:
            run.sample()
        if last or stopping or run.checkpoints.due(done):
            run.save(must=bool(stopping) and not last)
        if stopping and not last:
            run.stopped_by = stop.name or "a signal"
            return


def finish(run: TrainRun, stop: StopSignal) -> None:
    """After the last step: the final held-out loss, samples, and the final weights."""
    if run.stopped_by:
        return
    if run.val_data is not None and not run.evaluate(run.config.eval_final_batches, stop):
        run.stopped_by = stop.name or "a signal"  # all steps are saved: the same command evaluates again
        return
    run.sample()
    with run.step.optimizer.averaged():
        run.checkpoints.save_final(run.state, run.val)


def summarize(run: TrainRun, next_command: str) -> dict[str, Any]:
    """Write summary.json, release the run folder, log the result; return the summary."""
    state, val, stopped_by = run.state, run.val, run.stopped_by
    summary = {
        "stage": run.stage,
        "model_name": run.config.model_name,
        "run": str(run.folder),
        "status": f"stopped by {stopped_by}: the same command goes on" if stopped_by else "finished",
        "steps": state["step"],
        "tokens": state["tokens"],
        "seconds": round(state["seconds"], 1),
        "mfu": run.mfu(state["tokens"], state["seconds"]),
        "peak_flops": run.peak.flops,
        "peak_source": run.peak.source,
        "skipped_steps": state["skipped"],
        "train_loss": state["smooth_loss"],
        "val_loss": val.get("val_loss"),
        "val_bpc": val.get("val_bpc"),
        "best_checkpoint": run.checkpoints.best(),
        "params": run.model.num_params(),
        "next_command": "the same command again" if stopped_by else next_command,
    }
    run.log.close()
    if run.lock is not None:
        write_text(run.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
        run.lock.close()
    figures = [
        f"{name} {summary[name]:.4f}" for name in ("train_loss", "val_loss", "val_bpc") if summary[name] is not None
    ]
    log(
        f"{summary['status']}: {state['step']} steps, {format_count(state['tokens'])} tokens in "
        f"{format_seconds(state['seconds'])}; {', '.join(figures)}"
    )
    log(f"Next: {summary['next_command']}")
    return summary
