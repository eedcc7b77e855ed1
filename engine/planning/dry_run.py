"""--dry_run: what a whole run will need, from one measured step of it; nothing is written."""

import torch

from engine.data.loader import to_device
from engine.distributed import process_group
from engine.distributed.fsdp import local, reshard
from engine.planning import memory
from engine.runs.checkpoint_manager import checkpoint_bytes, disk_free, process_bytes, room_for_checkpoints
from utils.log import format_bytes, format_count, format_seconds

STEPS = 2  # the first warms up: it compiles, and makes the optimizer's state; the second is measured


def saved_bytes(model, batch, device, autocast) -> int:
    """Bytes that a forward pass of the eager model keeps for its backward pass; weights and buffers do not count."""
    own = {local(t).untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        source = tensor if tensor._base is None else tensor._base
        if not (source.is_leaf and source.requires_grad):  # a weight, gathered from its parts (fsdp)
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast():
        outputs = model(**to_device(batch, device))
    del outputs  # it held the graph, so that no two storages shared an address
    reshard(model)
    return sum(size for address, size in kept.items() if address not in own)


def estimate(
    config,
    run,
    model,
    optimizer,
    plan,
    total_steps: int,
    rows,
    val_rows,
    measured: tuple[int, float, int],
    activations: int,
    device,
) -> dict:
    """Everything that is said of a run, as numbers: bytes, seconds, FLOPs.

    measured: tokens (without padding), seconds and peak memory of a step; activations: of one micro-batch.
    """
    tokens, seconds, most = measured
    weights, whole = checkpoint_bytes(model, optimizer)
    mine, gradients, moments = process_bytes(model, optimizer)
    kept, disk = room_for_checkpoints(config, model, optimizer, total_steps)
    a_row = seconds / plan.global_rows
    training = plan.rows_before(total_steps) * a_row
    evaluating = evaluation_rows(config, plan, total_steps, val_rows) * a_row / 3  # forward is a third of the FLOPs
    parts = {"weights": mine, "gradients": gradients, "optimizer": moments, "activations": activations}
    return {
        "params": model.num_params(),
        "flops_per_token": model.flops_per_token(rows.seq_len),
        "rows": len(rows),
        "seq_len": rows.seq_len,
        "global_rows": plan.global_rows,
        "micro_rows": plan.micro_rows,
        "accumulation": plan.accumulation,
        "processes": process_group.world_size(),
        "steps": total_steps,
        "tokens": plan.rows_before(total_steps) * rows.seq_len,
        "epochs": plan.rows_before(total_steps) / len(rows),
        "memory": {**parts, "predicted": sum(parts.values()), "measured": most, "available": memory.available(device)},
        "checkpoint_bytes": whole,
        "final_bytes": weights,
        "checkpoints": kept,
        "disk_bytes": disk,
        "disk_free": disk_free(run),
        "step_seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "training_seconds": training,
        "evaluation_seconds": evaluating,
        "cost": config.price_per_hour * (training + evaluating) / 3600,
    }


def evaluation_rows(config, plan, total_steps: int, val_rows) -> int:
    """Rows that all held-out evaluations of a run read together."""
    if val_rows is None:
        return 0

    def rows(batches):
        return min(batches * plan.global_rows or len(val_rows), len(val_rows))

    times = (total_steps - 1) // config.eval_interval if config.eval_interval else 0
    return times * rows(config.eval_batches) + rows(config.eval_final_batches)


def table(title: str, about: dict, peak, device) -> str:
    """The figures for a reader, a line a subject."""
    params, mem = about["params"], about["memory"]
    share = peak.share(about["flops_per_token"], about["tokens_per_s"], about["processes"])
    where = "allocated on the GPU" if device.type == "cuda" else "of the whole process, Python and libraries included"
    total = about["training_seconds"] + about["evaluation_seconds"]
    lines = {
        "parameters": f"{format_count(params['total'])}, {format_count(params['active'])} active a token, "
        f"{format_count(params['embedding'])} in embedding tables",
        "FLOPs": f"{format_count(about['flops_per_token'])} a token (training, rows of {about['seq_len']} tokens)",
        "a step": f"{about['global_rows']} rows ({about['micro_rows']} x {about['accumulation']} accumulated x "
        f"{about['processes']} processes), {format_count(about['global_rows'] * about['seq_len'])} tokens",
        "the run": f"{about['steps']} steps, {format_count(about['tokens'])} tokens (padding included), "
        f"{about['epochs']:.3g} epochs of {about['rows']} rows",
        "memory": " + ".join(
            f"{name} {format_bytes(mem[name])}" for name in ("weights", "gradients", "optimizer", "activations")
        )
        + f" = {format_bytes(mem['predicted'])} predicted, a process",
        "": (
            f"{format_bytes(mem['measured'])} at the most in the measured step ({where})"
            if mem["measured"]
            else "not measured: this system does not tell"
        )
        + (f"; {format_bytes(mem['available'])} more are free" if mem["available"] is not None else ""),
        "checkpoint": f"{format_bytes(about['checkpoint_bytes'])}; final weights {format_bytes(about['final_bytes'])}",
        "disk": f"{format_bytes(about['disk_bytes'])} for {about['checkpoints']} checkpoints, the one being written "
        f"and the final weights; {format_bytes(about['disk_free'])} are free",
        "speed": f"{about['step_seconds']:.3g} s a step, {format_count(round(about['tokens_per_s']))} tokens/s, "
        f"MFU {share:.1%} of {peak}",
        "time": f"{format_seconds(total)}: training {format_seconds(about['training_seconds'])}, evaluation about "
        f"{format_seconds(about['evaluation_seconds'])}; saving and samples come on top",
    }
    if about["cost"]:
        lines["cost"] = f"{about['cost']:.2f} for {format_seconds(total)}"
    warnings = []
    if about["disk_free"] < about["disk_bytes"]:
        warnings.append("the disk is too small for this run: lower --keep_last, or choose another --output_path")
    width = max(map(len, lines))
    return "\n".join(
        [title, *(f"  {name:<{width}}  {text}" for name, text in lines.items()), *(f"  ! {text}" for text in warnings)]
    )
