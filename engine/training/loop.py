"""The only training loop. Every stage goes through train(), and it knows the model by its contract alone."""

import dataclasses
import inspect
import json
import math
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from engine.data.loader import StepLoader
from engine.distributed import fsdp, process_group
from engine.planning import dry_run, memory
from engine.planning.batch_size import find_max_batch_size
from engine.planning.mfu import HardwarePeak, synchronize
from engine.runs.checkpoint import load_training_state
from engine.runs.checkpoint_manager import CheckpointManager, ensure_room
from engine.runs.metrics import RunLog, log_text
from engine.runs.run_folder import (
    choose_run_directory,
    lock_folder,
    micro_batch_of,
    remove_if_empty_on_error,
    run_fingerprint,
    source_fingerprint,
    write_run_files,
)
from engine.training.bad_steps import BadStepFilter
from engine.training.config import plan_batch, plan_steps, resolve_precision
from engine.training.diagnostics import Diagnostics
from engine.training.evaluate import characters_of, held_out_loss
from engine.training.samples import write_samples
from engine.training.schedule import learning_rate
from engine.training.step import TrainStep, wants_compile
from engine.training.stop_signal import StopSignal
from utils.atomic import write_text
from utils.log import Progress, format_count, format_seconds, log


def train(
    config, stage: str, model, tokenizer, train_rows, val_rows, next_command: str, facts: dict | None = None
) -> dict:
    """Train `model` on `train_rows` and return the run's summary (written to summary.json too).

    config: a TrainConfig. train_rows and val_rows: see engine/data/sequences.py; val_rows may be None. next_command: what to type
    after this stage, with {run} for the run folder. facts: what else decides the run (e.g. the weights it starts
    from), as JSON values.
    Raises UserError for settings that cannot work and for a run whose loss is no number any more.
    """
    # ---------------------------------------------------------------- 1. the plan: what this run is, and where it goes
    device = process_group.init(config.device)
    plan = plan_batch(config, train_rows.seq_len)
    total_steps, plan = plan_steps(config, plan, len(train_rows), train_rows.seq_len)
    model_source = Path(inspect.getfile(type(model)))
    who = run_fingerprint(
        config,
        {
            "stage": stage,
            "model": dataclasses.asdict(model.args),
            "model_file": source_fingerprint(model_source),
            "global_batch_size": plan.global_rows,
            "steps": total_steps,
            "data": train_rows.file.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            **(facts or {}),
        },
    )
    place = choose_run_directory(config, stage, who)
    folder = place.folder
    next_command = next_command.format(run=folder)
    if place.summary is not None:
        log(f"{folder} is finished: nothing to do (--resume=never trains anew). Next: {next_command}")
        return place.summary

    # ---------------------------------------------------------------- 2. model, optimizer, and the state to go on from
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32; on a CPU it would trade exactness for nothing
    if config.parallel == "fsdp" and process_group.world_size() > 1:  # never whole on the device, which may not hold it
        process_group.broadcast_weights(model.train())
        fsdp.shard(model, device, resolve_precision(config.precision, device), wants_compile(config, device))
    else:
        process_group.broadcast_weights(model.to(device).train())
    sharded = fsdp.is_sharded(model)
    if config.parallel == "fsdp" and not sharded:  # as when one of two machines is left
        log("--parallel=fsdp: there is one process, which keeps the whole model")
    stepper = TrainStep(model, config, device)
    optimizer, parameters, scaler = stepper.optimizer, stepper.parameters, stepper.scaler
    compiled, forward = stepper.compiled, stepper.forward
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "skipped": 0, "bad_in_a_row": 0, "smooth_loss": 0.0}
    if place.checkpoint is not None:
        process_group.refuse_unless_shared(place.checkpoint)
        state = load_training_state(place.checkpoint, model, optimizer)
        scaler.load_state_dict(state.pop("scaler", {})) if scaler.is_enabled() else None
    health = Diagnostics(model, hooks=not compiled)
    if not config.max_batch_size or config.dry_run:
        model.before_step(0, total_steps)  # both look at a forward pass before the first step
    if not config.max_batch_size:  # the number goes to config.yaml, and a resumed run takes it from there
        config.max_batch_size = (place.checkpoint and micro_batch_of(folder)) or find_max_batch_size(
            plan.micro_rows, model, optimizer, train_rows, device, stepper.autocast
        )
        total_steps, plan = plan_steps(
            config, plan_batch(config, train_rows.seq_len), len(train_rows), train_rows.seq_len
        )
    peak = HardwarePeak(device, stepper.precision, config.peak_tflops)
    flops_per_token = model.flops_per_token(train_rows.seq_len)

    def mfu(tokens: float, seconds: float) -> float:
        return round(peak.share(flops_per_token, tokens / max(seconds, 1e-9), process_group.world_size()), 4)

    # ---------------------------------------------------------------- 3. the run folder
    main = process_group.is_main() and not config.dry_run  # who writes
    params = model.num_params()
    if main:
        ensure_room(folder, config, model, optimizer, total_steps)
    lock = lock_folder(folder) if main else None
    if main:
        write_run_files(folder, config, stage, who, model, tokenizer, model_source)
    if sharded and not config.dry_run:
        process_group.refuse_unless_shared(folder)
    run_log = RunLog(folder if main else None, state["step"])
    prompts = val_rows.openings(4) if (main or sharded) and val_rows is not None else []
    log(
        f"{stage} {config.model_name}: {format_count(params['total'])} parameters "
        f"({format_count(params['active'])} active), {device.type} "
        f"{stepper.precision}{' compiled' if compiled else ''}, "
        f"{process_group.world_size()} process(es){', fsdp' if sharded else ''}"
    )
    where = "a dry run: nothing is written" if config.dry_run else f"run folder {folder}"
    log(
        f"{len(train_rows)} rows of {train_rows.seq_len} tokens, {plan.global_rows} a step ({plan.micro_rows} x "
        f"{plan.accumulation} x {process_group.world_size()}), {total_steps} steps; {where}"
        + (f", from step {state['step']}" if state["step"] else "")
    )
    log(f"100% MFU: {peak} x {process_group.world_size()}; {format_count(flops_per_token)} FLOPs a token")

    progress = Progress(total_steps, state["step"], stage)
    guard = BadStepFilter(model, config.spike_bound, state, run_log, overflows=scaler.is_enabled())
    saver = CheckpointManager(
        folder,
        config,
        model,
        optimizer,
        {
            "stage": stage,
            "model_name": config.model_name,
            "params": params["total"],
            "tokenizer": tokenizer.fingerprint,
            "data": train_rows.file.fingerprint,
        },
    )
    val: dict = {}

    @contextmanager
    def averaged():
        with optimizer.averaged():
            yield
            fsdp.reshard(model)

    def evaluate(batches: int, stop: StopSignal | None = None) -> bool:
        """Whether it came to its end: not when a signal came first that `stop` knows of."""
        guard.read()
        limit = batches * plan.global_rows
        with averaged():
            found = held_out_loss(
                model,
                forward,
                val_rows,
                tokenizer.characters,
                plan.micro_rows,
                limit,
                device,
                stepper.compute,
                trim=not compiled,
                stop=stop,
            )
        if found is None:
            return False
        val.update(found)
        bits = f", {val['val_bpc']:.4f} bits a character" if val["val_bpc"] is not None else ""
        progress.write(f"step {state['step']}: held-out loss {val['val_loss']:.4f}{bits}")
        val["step"] = state["step"]
        run_log.evaluation({"tokens": state["tokens"], **val, "final": state["step"] == total_steps})
        return True

    def sample() -> None:
        if prompts:
            with averaged(), fsdp.broadcast_logits(model):
                text = write_samples(
                    folder / "samples.md" if main else None,
                    state["step"],
                    model,
                    tokenizer,
                    prompts,
                    stepper.compute,
                    config.seed,
                )
            run_log.text("samples", text, state["step"])

    # ---------------------------------------------------------------- 4. the loop
    until, step_plan = (dry_run.STEPS, replace(plan, ramp_steps=0)) if config.dry_run else (total_steps, plan)
    loader = StepLoader(
        train_rows,
        step_plan,
        config.seed,
        state["step"],
        until,
        process_group.rank(),
        process_group.world_size(),
        pin=device.type == "cuda",
        trim=not compiled,
    )
    if config.dry_run:
        activations = dry_run.saved_bytes(model, loader.make(0).batches[0], device, stepper.autocast)
    since_log = [0, 0.0]  # tokens and seconds of pure training since the last log line
    stopped_by = ""
    with remove_if_empty_on_error(folder), StopSignal() as stop, closing(loader), closing(progress), guard:
        for work in loader:
            started = time.perf_counter()
            step = state["step"]
            # 4a. what depends on the step alone. So does randomness, below: there is no generator state to save
            lr = learning_rate(step, total_steps, config)
            optimizer.set_lr(lr)
            model.before_step(step, total_steps)
            guard.remember()

            done, last = step + 1, step + 1 == total_steps
            logged = (done % config.log_interval == 0 or last or done == 1) and not config.dry_run
            if logged:
                health.watch()

            # 4b. forward and backward. Each micro-batch weighs as much as it has valid targets in the step of all
            # processes: a mean over tokens, not a mean of means
            written = characters_of(tokenizer.characters, work.batches) if logged else 0
            targets, tokens, stopping, written = process_group.sum_numbers(
                [sum(work.targets), work.tokens, stop.wanted, written]
            )
            # whoever computes it, a micro-batch has its number in the step, and by it its randomness
            numbers = range(
                process_group.rank(), len(work.batches) * process_group.world_size(), process_group.world_size()
            )
            values = stepper.gradients(
                work.batches,
                [count / max(1, targets) for count in work.targets],
                [((config.seed * 1_000_003 + step) * 65536 + number) % 2**63 for number in numbers],
                share=1 / (len(work.batches) * process_group.world_size()),
            )

            # 4c. gradients of all processes, clipped; the device takes the step only if its numbers are to be trusted.
            # The host reads them a step later: nowhere does it wait for what it has just told the device
            if not sharded:  # those of a shared model are summed in its backward pass
                process_group.sum_gradients(parameters)
            scaler.unscale_(optimizer)
            values = process_group.sum_tensors(values)
            if logged:
                health.before_update()
            norm = stepper.clip()
            good = guard.judge(values["loss"], norm, done, work.epoch, work.rows)
            stepper.update(good)
            other_vars = {name: value for name, value in values.items() if name != "loss"}
            guard.settle(good, lambda other_vars=other_vars: model.after_step(other_vars))

            if config.dry_run:
                guard.read()
                synchronize(device)
                measured = int(tokens), time.perf_counter() - started, memory.peak_memory(device)
                memory.reset_peak_memory(device)
                continue

            # 4d. tell
            if logged:
                loss_value, norm_value = guard.read()
            seconds = time.perf_counter() - started
            state["step"], state["tokens"] = done, state["tokens"] + int(tokens)
            state["seconds"] += seconds
            since_log = [since_log[0] + tokens, since_log[1] + seconds]
            text = None
            if logged:
                bits = values.get("loss/ce", values["loss"]).item() / math.log(2)
                record = {
                    "step": done,
                    "tokens": state["tokens"],
                    "loss": loss_value,
                    "lr": lr,
                    "bpc": bits * targets / written if written else None,
                    "grad_norm": norm_value,
                    "tokens_per_s": round(since_log[0] / max(since_log[1], 1e-9), 1),
                    "mfu": mfu(*since_log),
                }
                del values["loss"]
                run_log.step(record, values | health.after_update(done, values))
                text = log_text(
                    record, state["smooth_loss"], val.get("val_loss"), state["skipped"], memory.peak_memory(device)
                )
                since_log = [0, 0.0]
            progress.update(done, text)

            # 4e. look and keep
            if val_rows is not None and config.eval_interval and done % config.eval_interval == 0 and not last:
                evaluate(config.eval_batches)
            if config.sample_interval and done % config.sample_interval == 0 and not last:
                sample()
            if last or stopping or saver.due(done):
                guard.read()
                run_log.sync()
                scaling = {"scaler": scaler.state_dict()} if scaler.is_enabled() else {}
                saver.save({**state, **scaling}, val, must=stopping and not last)
            if stopping and not last:
                stopped_by = stop.name or "a signal"
                break

        # ------------------------------------------------------------ 5. the end: held-out loss, final weights
        if not stopped_by and not config.dry_run:
            if val_rows is not None and not evaluate(config.eval_final_batches, stop):
                stopped_by = stop.name or "a signal"  # all steps are done and saved: the same command evaluates again
            else:
                sample()
                with optimizer.averaged():
                    saver.save_final(state, val)

    if config.dry_run:
        about = dry_run.estimate(
            config, folder, model, optimizer, plan, total_steps, train_rows, val_rows, measured, activations, device
        )
        log(dry_run.table(f"{stage} {config.model_name}", about, peak, device))
        return about

    # ---------------------------------------------------------------- 6. what is left of it in one place
    summary = {
        "stage": stage,
        "model_name": config.model_name,
        "run": str(folder),
        "status": f"stopped by {stopped_by}: the same command goes on" if stopped_by else "finished",
        "steps": state["step"],
        "tokens": state["tokens"],
        "seconds": round(state["seconds"], 1),
        "mfu": mfu(state["tokens"], state["seconds"]),
        "peak_flops": peak.flops,
        "peak_source": peak.source,
        "skipped_steps": state["skipped"],
        "train_loss": state["smooth_loss"],
        "val_loss": val.get("val_loss"),
        "val_bpc": val.get("val_bpc"),
        "best_checkpoint": saver.best(),
        "params": params,
        "next_command": "the same command again" if stopped_by else next_command,
    }
    run_log.close()
    if main:
        write_text(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
        lock.close()
    figures = [
        f"{name} {summary[name]:.4f}" for name in ("train_loss", "val_loss", "val_bpc") if summary[name] is not None
    ]
    log(
        f"{summary['status']}: {state['step']} steps, {format_count(state['tokens'])} tokens in "
        f"{format_seconds(state['seconds'])}; {', '.join(figures)}"
    )
    log(f"Next: {summary['next_command']}")
    return summary
