"""The process group: on a single process every function here is a no-op or the identity.

Gradients are summed by an explicit all-reduce after the last micro-batch, not by DistributedDataParallel. DDP
overlaps communication with the backward pass, but it must know which parameters a step uses (a model may leave some
unused), breaks the graph of torch.compile, and averages over ranks where a sum weighted by valid targets is needed.
With gradient accumulation the all-reduce is a small share of the step, and this needs twenty lines.
"""

import atexit
import os
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from utils.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # for a process that does not respond
BUCKET_BYTES = 64 * 2**20  # gradients are reduced in flat buffers of about this size: few calls, little extra memory


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def find_device(wanted: str = "auto") -> torch.device:
    """The device of this process: cuda (one per local rank), else mps, else cpu. UserError when it is not available."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda, but PyTorch sees no CUDA device: use --device=auto or --device=cpu")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps, but PyTorch sees no Apple GPU: use --device=auto or --device=cpu")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started more processes than the {torch.cuda.device_count()} CUDA devices here: "
                "lower --nproc_per_node"
            )
        return torch.device("cuda", local_rank)
    return torch.device(wanted)


def init(wanted: str = "auto") -> torch.device:
    """Find the device and, under torchrun, join the process group (nccl on cuda, gloo elsewhere)."""
    device = find_device(wanted)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "mps":
            raise UserError("several processes need cuda or cpu: add --device=cpu, or start without torchrun")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo also reduces values of the host
        dist.init_process_group(backend, timeout=TIMEOUT, **fresh_store())
        atexit.register(cleanup)
    return device


def fresh_store() -> dict:
    """The rendezvous as arguments of init_process_group, under a key prefix that no earlier attempt has used.

    torchrun keeps one store over its restarts: a process would find the address of a dead one there, and wait for it.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    return {
        "store": dist.PrefixStore(agree_on_prefix(store, rank, world_size), store),
        "rank": rank,
        "world_size": world_size,
    }


def agree_on_prefix(store: dist.Store, rank: int, world_size: int) -> str:
    """A key prefix for this attempt, equal on all its processes, whatever earlier attempts have left in the store.

    Rank 0 offers a new prefix and the others accept it; then rank 0 withdraws the offer, and confirms it only after
    that. So an old offer is never confirmed, and a process that accepted the offer of a dead rank 0 keeps polling.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        store.set("offer", name)
        for other in range(1, world_size):
            store.get(f"{name}/accepted/{other}")  # waits for it
        store.set("offer", "")
        store.set(f"{name}/confirmed", "")
        return name
    accepted = ""
    while not (accepted and store.check([f"{accepted}/confirmed"])):
        time.sleep(0.02)
        offer = store.get("offer").decode()
        if offer and offer != accepted:
            store.set(f"{offer}/accepted/{rank}", "")
            accepted = offer
    return accepted


def cleanup() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_numbers(numbers: Sequence[float]) -> list[float]:
    """Sum Python scalars over ranks through gloo, without waiting for the device."""
    if not dist.is_initialized():
        return list(numbers)
    return all_reduce_sum(torch.tensor(numbers, dtype=torch.float64)).tolist()


def sum_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum over ranks a dict with equal keys and shapes on all of them, in one all-reduce."""
    if not dist.is_initialized() or not tensors:
        return tensors
    keys = sorted(tensors)
    flat = all_reduce_sum(torch.cat([tensors[key].float().reshape(-1) for key in keys]))
    parts = flat.split([tensors[key].numel() for key in keys])
    return {key: part.view(tensors[key].shape) for key, part in zip(keys, parts)}


def broadcast_object(value: T) -> T:
    """Rank 0's picklable value, on every rank; never one that was read from a file."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def refuse_unless_shared(folder: Path) -> None:
    """UserError on all processes unless all of them see the folder."""
    barrier()
    missing = sum_numbers([float(not folder.is_dir())])[0]
    if missing:
        raise UserError(
            f"{int(missing)} of {world_size()} processes do not see {folder}: put --output_path on a disk "
            "that all machines share"
        )


@torch.no_grad()
def broadcast_weights(model: torch.nn.Module) -> None:
    """Broadcast the parameters and buffers of rank 0."""
    if dist.is_initialized():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor, src=0)


@torch.no_grad()
def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sum .grad over ranks in flat buckets; a parameter that only some ranks used counts as zero on the others."""
    if not dist.is_initialized():
        return
    used = sum_numbers([p.grad is not None for p in parameters])
    for parameter, count in zip(parameters, used):
        if count and parameter.grad is None:  # unused everywhere stays None, as on one process
            parameter.grad = torch.zeros_like(parameter)
    bucket: list[torch.Tensor] = []
    size = 0
    gradients = [p.grad for p in parameters if p.grad is not None]
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
        last = i + 1 == len(gradients) or gradients[i + 1].dtype != gradient.dtype
        if last or size >= BUCKET_BYTES:
            flat = all_reduce_sum(torch.cat([g.reshape(-1) for g in bucket]))
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(part.view_as(g))
            bucket = []
            size = 0
