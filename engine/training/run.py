"""A training run: everything that the loop needs, set up in one place, and what it does besides optimizer steps."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.data.loader import StepLoader
from engine.data.sequences import DocumentSequences, Sequences
from engine.distributed import fsdp, process_group
from engine.planning.disk import ensure_room
from engine.planning.memory import peak_memory
from engine.planning.mfu import HardwarePeak
from engine.runs.checkpoint import load_training_state
from engine.runs.checkpoint_manager import CheckpointManager
from engine.runs.metrics import RunLog, log_text
from engine.runs.run_folder import Fingerprint, RunDirectory, lock_folder, precision_of, write_run_files
from engine.training.bad_steps import BadStepFilter
from engine.training.batch_plan import BatchPlan, plan_run
from engine.training.build import model_source
from engine.training.config import TrainConfig
from engine.training.diagnostics import Diagnostics
from engine.training.evaluate import held_out_loss
from engine.training.precision import fast_bf16, resolve_precision
from engine.training.samples import write_samples
from engine.training.step import TrainStep, wants_compile
from engine.training.stop_signal import StopSignal
from model.basemodel import BaseModel
from utils.log import Progress, format_count, log, warn
from utils.tokenizer import Tokenizer

PROMPTS = 4  # of the held-out data, for samples.md


@dataclass
class TrainRun:
    """One run of a stage. The loop changes `state`, `val` and `stopped_by`; all else is fixed by `set_up`."""

    config: TrainConfig
    stage: str
    folder: Path
    model: BaseModel
    tokenizer: Tokenizer
    val_data: DocumentSequences | None
    step: TrainStep
    state: dict[str, Any]  # saved with every checkpoint: step, tokens, seconds, skipped, smooth_loss ...
    plan: BatchPlan
    total_steps: int
    loader: StepLoader
    bad_steps: BadStepFilter
    diagnostics: Diagnostics
    checkpoints: CheckpointManager
    log: RunLog
    progress: Progress
    peak: HardwarePeak
    flops_per_token: float
    lock: ExitStack | None  # of the run folder; None on the processes that do not write
    prompts: list[list[int]]
    val: dict[str, Any] = field(default_factory=dict)  # the last held-out evaluation, and its step
    stopped_by: str = ""  # the name of the signal that ended the loop early

    def mfu(self, tokens: float, seconds: float) -> float:
        """Model FLOPs utilisation at so many tokens in so many seconds, over all processes."""
        rate = tokens / max(seconds, 1e-9)
        return round(self.peak.share(self.flops_per_token, rate, process_group.world_size()), 4)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the parameters are their moving averages, when there are any."""
        with self.step.optimizer.averaged():
            yield
            fsdp.reshard(self.model)

    def log_step(self, record: dict[str, Any], other_vars: dict[str, torch.Tensor]) -> str:
        """Record a step in metrics.jsonl and TensorBoard, with its diagnostics; return the text of its log line."""
        self.log.step(record, other_vars | self.diagnostics.after_update(record["step"], other_vars))
        state = self.state
        return log_text(
            record, state["smooth_loss"], self.val.get("val_loss"), state["skipped"], peak_memory(self.step.device)
        )

    def evaluate(self, batches: int, stop: StopSignal | None = None) -> bool:
        """Measure the held-out loss over `batches` global batches (0: all data); False when `stop` came first."""
        assert self.val_data is not None
        self.bad_steps.read()
        with self.averaged():
            found = held_out_loss(
                self.model,
                self.step.forward,
                self.val_data,
                self.tokenizer.characters,
                self.plan.micro_sequences,
                batches * self.plan.global_sequences,
                self.step.device,
                self.step.compute_dtype,
                trim=not self.step.compiled,
                stop=stop,
            )
        if found is None:
            return False
        step = self.state["step"]
        self.val.update(found)
        bits = f", {found['val_bpc']:.4f} bits per character" if found["val_bpc"] is not None else ""
        self.progress.write(f"step {step}: held-out loss {found['val_loss']:.4f}{bits}")
        self.val["step"] = step
        self.log.evaluation({"tokens": self.state["tokens"], **self.val, "final": step == self.total_steps})
        return True

    def sample(self) -> None:
        """Generate from the prompts into samples.md and TensorBoard."""
        if not self.prompts:
            return
        with self.averaged(), fsdp.broadcast_logits(self.model):
            text = write_samples(
                self.folder / "samples.md" if process_group.is_main() else None,
                self.state["step"],
                self.model,
                self.tokenizer,
                self.prompts,
                self.step.compute_dtype,
                self.config.seed,
            )
        self.log.text("samples", text, self.state["step"])

    def save(self, must: bool) -> None:
        """Save a step checkpoint. must: a failed save is a UserError instead of a later retry."""
        self.bad_steps.read()
        self.log.sync()
        scaler = self.step.scaler
        scaling = {"scaler": scaler.state_dict()} if scaler.is_enabled() else {}
        self.checkpoints.save({**self.state, **scaling}, self.val, must=must)


def run_precision(config: TrainConfig, directory: RunDirectory, model: BaseModel, device: torch.device) -> str:
    """The precision of the run, the same on all processes: for --precision=auto the one it began with, if it did."""
    wanted = config.precision
    if wanted == "auto" and directory.checkpoint is not None:
        wanted = precision_of(directory.folder)
        if wanted == "auto" and device.type == "cpu":
            wanted = "fp32"  # as --precision=auto was on any CPU when the run began, in version 0.2.0
        if wanted == "bf16" and device.type == "cpu" and not fast_bf16(device):
            warn(f"{directory.folder} computes in bf16, for which this CPU has no instructions: it will be slow")
    return process_group.broadcast_object(resolve_precision(wanted, device, model))


def place_model(config: TrainConfig, model: BaseModel, device: torch.device) -> None:
    """Move the model to its device with the weights of rank 0, sharded over the processes for --parallel=fsdp."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32; on a CPU it would lose precision without a gain
    model.train()
    if config.parallel == "fsdp" and process_group.world_size() > 1:  # the full model may not fit the device
        process_group.broadcast_weights(model)
        fsdp.shard(model, device, config.precision, wants_compile(config, device))
        return
    process_group.broadcast_weights(model.to(device))
    if config.parallel == "fsdp":  # as when one of two machines is left
        log("--parallel=fsdp: there is one process, which holds the full model")


def restore_state(checkpoint: Path | None, model: BaseModel, step: TrainStep) -> dict[str, Any]:
    """The trainer's state: of `checkpoint`, with model, optimizer and scaler restored from it, or of a new run."""
    if checkpoint is None:
        return {"step": 0, "tokens": 0, "seconds": 0.0, "skipped": 0, "bad_in_a_row": 0, "smooth_loss": 0.0}
    process_group.refuse_unless_shared(checkpoint)
    state = load_training_state(checkpoint, model, step.optimizer)
    if step.scaler.is_enabled():
        step.scaler.load_state_dict(state.pop("scaler", {}))
    return state


def set_up(
    config: TrainConfig,
    stage: str,
    model: BaseModel,
    step: TrainStep,
    state: dict[str, Any],
    tokenizer: Tokenizer,
    train_data: Sequences,
    val_data: DocumentSequences | None,
    directory: RunDirectory,
    fingerprint: Fingerprint,
) -> TrainRun:
    """Create the run folder and everything around the step. config.max_batch_size is resolved.

    UserError: the disk is too small, or another process trains in the folder.
    """
    plan, total_steps = plan_run(config, len(train_data), train_data.seq_len)
    folder = directory.folder
    rank, processes = process_group.rank(), process_group.world_size()
    main = process_group.is_main()
    if main:
        ensure_room(folder, config, model, step.optimizer, total_steps)
    lock = lock_folder(folder) if main else None
    if main:
        write_run_files(folder, config, stage, fingerprint, model, tokenizer, model_source(model))
    if step.sharded:
        process_group.refuse_unless_shared(folder)
    run_log = RunLog(folder if main else None, state["step"])
    peak = HardwarePeak(step.device, step.precision, config.peak_tflops)
    log_plan(f"{stage} {config.model_name}", model, step, plan, total_steps, train_data, peak)
    log(f"run folder {folder}" + (f", from step {state['step']}" if state["step"] else ""))
    about = {
        "stage": stage,
        "model_name": config.model_name,
        "params": model.num_params()["total"],
        "tokenizer": tokenizer.fingerprint,
        "data": train_data.file.fingerprint,
    }
    pin, trim = step.device.type == "cuda", not step.compiled
    return TrainRun(
        config=config,
        stage=stage,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        val_data=val_data,
        step=step,
        state=state,
        plan=plan,
        total_steps=total_steps,
        loader=StepLoader(
            train_data, plan, config.seed, state["step"], total_steps, rank, processes, pin=pin, trim=trim
        ),
        bad_steps=BadStepFilter(model, config.spike_bound, state, run_log, fp16=step.scaler.is_enabled()),
        diagnostics=Diagnostics(model, hooks=not step.compiled),
        checkpoints=CheckpointManager(folder, config, model, step.optimizer, about),
        log=run_log,
        progress=Progress(total_steps, state["step"], stage),
        peak=peak,
        flops_per_token=model.flops_per_token(train_data.seq_len),
        lock=lock,
        prompts=val_data.prompts(PROMPTS) if (main or step.sharded) and val_data is not None else [],
    )


def log_plan(
    title: str,
    model: BaseModel,
    step: TrainStep,
    plan: BatchPlan,
    total_steps: int,
    train_data: Sequences,
    peak: HardwarePeak,
) -> None:
    """Log the size of the model, how it is computed, and how long the run is."""
    params, processes = model.num_params(), process_group.world_size()
    flops_per_token = model.flops_per_token(train_data.seq_len)
    log(
        f"{title}: {format_count(params['total'])} parameters ({format_count(params['active'])} active), "
        f"{step.device.type} {step.precision}{' compiled' if step.compiled else ''}, "
        f"{processes} process(es){', fsdp' if step.sharded else ''}"
    )
    log(
        f"{len(train_data)} sequences of {train_data.seq_len} tokens, {plan.global_sequences} per step "
        f"({plan.micro_sequences} x {plan.accumulation} x {processes}), {total_steps} steps"
    )
    log(f"100% MFU: {peak} x {processes}; {format_count(flops_per_token)} FLOPs per token")


def bits_per_character(nats_per_target: float, targets: float, characters: float) -> float | None:
    """Bits per character of a mean loss over `targets` in which `characters` begin; None without any."""
    return nats_per_target / math.log(2) * targets / characters if characters else None
