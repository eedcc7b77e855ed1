"""--dry_run: what a full run will need, estimated from one measured step of it; nothing is written."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from engine.data.loader import to_device
from engine.data.sequences import Sequences
from engine.distributed import process_group
from engine.distributed.fsdp import local, reshard
from engine.planning import memory
from engine.planning.disk import disk_free, room_for_checkpoints
from engine.planning.mfu import HardwarePeak
from engine.runs.checkpoint_manager import checkpoint_bytes
from engine.runs.protocols import TrainOptimizer
from model.basemodel import BaseModel
from utils.log import format_bytes, format_count, format_seconds, log


class MeasuredStep(NamedTuple):
    """What was measured of one optimizer step of the full batch."""

    tokens: int  # padding excluded, over all processes
    seconds: float
    peak_memory: int  # bytes of this process; 0: unknown
    activations: int  # bytes that one micro-batch keeps for its backward pass


class Plan(Protocol):
    """What the estimate needs of a BatchPlan (engine/training/batch_plan.py)."""

    @property
    def global_sequences(self) -> int: ...

    @property
    def micro_sequences(self) -> int: ...

    @property
    def accumulation(self) -> int: ...

    def sequences_before(self, step: int) -> int: ...


def dry_run(
    title: str,
    config: Any,
    run: Path,
    model: BaseModel,
    optimizer: TrainOptimizer,
    plan: Plan,
    total_steps: int,
    train_data: Sequences,
    val_data: Sequences | None,
    measured: MeasuredStep,
    peak: HardwarePeak,
) -> dict[str, Any]:
    """Estimate the run from a measured step, log the table, and return the estimates in bytes, seconds and FLOPs.

    run: the folder it would go to. optimizer: the trainer's, whose state exists after the measured step.
    """
    device = next(model.parameters()).device
    weights, checkpoint = checkpoint_bytes(model, optimizer)
    shard, gradients, moments = memory.process_bytes(model, optimizer)
    kept, disk = room_for_checkpoints(config, model, optimizer, total_steps)
    per_sequence = measured.seconds / plan.global_sequences
    sequences = plan.sequences_before(total_steps)
    # a forward pass is a third of the FLOPs of a training step
    evaluation = evaluated_sequences(config, plan, total_steps, val_data) * per_sequence / 3
    training = sequences * per_sequence
    parts = {"weights": shard, "gradients": gradients, "optimizer": moments, "activations": measured.activations}
    estimate = {
        "params": model.num_params(),
        "flops_per_token": model.flops_per_token(train_data.seq_len),
        "sequences": len(train_data),
        "seq_len": train_data.seq_len,
        "global_sequences": plan.global_sequences,
        "micro_sequences": plan.micro_sequences,
        "accumulation": plan.accumulation,
        "processes": process_group.world_size(),
        "steps": total_steps,
        "tokens": sequences * train_data.seq_len,
        "epochs": sequences / len(train_data),
        "memory": {
            **parts,
            "predicted": sum(parts.values()),
            "measured": measured.peak_memory,
            "available": memory.available(device),
        },
        "checkpoint_bytes": checkpoint,
        "final_bytes": weights,
        "checkpoints": kept,
        "disk_bytes": disk,
        "disk_free": disk_free(run),
        "step_seconds": measured.seconds,
        "tokens_per_s": measured.tokens / measured.seconds,
        "training_seconds": training,
        "evaluation_seconds": evaluation,
        "cost": config.price_per_hour * (training + evaluation) / 3600,
    }
    log(table(title, estimate, peak, device))
    return estimate


def saved_bytes(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> int:
    """Bytes that a forward pass of the eager model keeps for its backward pass, without weights and buffers."""
    own = {local(t).untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        source = tensor if tensor._base is None else tensor._base
        if not (source.is_leaf and source.requires_grad):  # a weight, all-gathered from its shards (fsdp)
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast():
        outputs = model(**to_device(batch, device))
    del outputs  # it held the graph, so that no two storages shared an address
    reshard(model)
    return sum(size for address, size in kept.items() if address not in own)


def evaluated_sequences(config: Any, plan: Plan, total_steps: int, val_data: Sequences | None, done: int = 0) -> int:
    """Sequences that all held-out evaluations of a run read together, those after step `done`."""
    if val_data is None:
        return 0
    total = len(val_data)

    def sequences(batches: int) -> int:
        return min(batches * plan.global_sequences or total, total)

    times = times_between(done, total_steps, config.eval_interval)
    return times * sequences(config.eval_batches) + sequences(config.eval_final_batches)


def times_between(done: int, total_steps: int, interval: int) -> int:
    """How often a run evaluates or samples after step `done` and before its last one, every `interval` steps."""
    return max(0, (total_steps - 1) // interval - done // interval) if interval else 0


def table(title: str, estimate: dict[str, Any], peak: HardwarePeak, device: torch.device) -> str:
    """The estimates as text, one line per quantity."""
    e = estimate
    share = peak.share(e["flops_per_token"], e["tokens_per_s"], e["processes"])
    total = e["training_seconds"] + e["evaluation_seconds"]
    params = e["params"]
    lines = {
        "parameters": f"{format_count(params['total'])}, {format_count(params['active'])} active per token, "
        f"{format_count(params['embedding'])} in embedding tables",
        "FLOPs": f"{format_count(e['flops_per_token'])} per token (training, sequences of {e['seq_len']} tokens)",
        "step": f"{e['global_sequences']} sequences ({e['micro_sequences']} x {e['accumulation']} accumulated x "
        f"{e['processes']} processes), {format_count(e['global_sequences'] * e['seq_len'])} tokens",
        "run": f"{e['steps']} steps, {format_count(e['tokens'])} tokens (padding included), "
        f"{e['epochs']:.3g} epochs of {e['sequences']} sequences",
        **memory_lines(e["memory"], device),
        "checkpoint": f"{format_bytes(e['checkpoint_bytes'])}; final weights {format_bytes(e['final_bytes'])}",
        "disk": f"{format_bytes(e['disk_bytes'])} for {e['checkpoints']} checkpoints, the one being written "
        f"and the final weights; {format_bytes(e['disk_free'])} free",
        "speed": f"{e['step_seconds']:.3g} s per step, {format_count(round(e['tokens_per_s']))} tokens/s, "
        f"MFU {share:.1%} of {peak}",
        "time": f"{format_seconds(total)}: training {format_seconds(e['training_seconds'])}, evaluation about "
        f"{format_seconds(e['evaluation_seconds'])}; plus saving and samples",
    }
    if e["cost"]:
        lines["cost"] = f"{e['cost']:.2f} for {format_seconds(total)}"
    warnings = []
    if e["disk_free"] < e["disk_bytes"]:
        warnings.append("the disk is too small for this run: lower --keep_last, or choose another --output_path")
    width = max(map(len, lines))
    return "\n".join(
        [title, *(f"  {name:<{width}}  {text}" for name, text in lines.items()), *(f"  ! {text}" for text in warnings)]
    )


def memory_lines(memory: dict[str, Any], device: torch.device) -> dict[str, str]:
    """The two lines on memory: predicted by component, and measured."""
    parts = " + ".join(
        f"{name} {format_bytes(memory[name])}" for name in ("weights", "gradients", "optimizer", "activations")
    )
    scope = "allocated on the GPU" if device.type == "cuda" else "of the process, Python and libraries included"
    measured = "not measured: the system does not report it"
    if memory["measured"]:
        measured = f"{format_bytes(memory['measured'])} at the peak of the measured step ({scope})"
    if memory["available"] is not None:
        measured += f"; {format_bytes(memory['available'])} more are free"
    return {"memory": f"{parts} = {format_bytes(memory['predicted'])} predicted, per process", "": measured}
