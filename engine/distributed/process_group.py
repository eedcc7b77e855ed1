"""One process or many: every function here is a no-op, or the identity, on a single process.

Gradients are averaged by an explicit all-reduce after the last micro-batch, not by DistributedDataParallel. DDP
overlaps the exchange with the backward pass, but it must know which parameters a step touches (a plugin may leave
some unused), breaks the graph of torch.compile, and averages ranks where we need a sum weighted by valid tokens.
With gradient accumulation the exchange is a small part of the step, and this way is twenty lines that always hold.
"""

import atexit
import os
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from utils.errors import UserError

TIMEOUT = timedelta(minutes=30)  # for a process that does not answer
BUCKET_BYTES = 64 * 2**20  # gradients travel in flat buffers of about this size: few calls, little extra memory


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def find_device(wanted: str = "auto") -> torch.device:
    """The device of this process: cuda (one a local rank), else mps, else cpu. UserError when it is not there."""
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
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo also carries the host's numbers
        dist.init_process_group(backend, timeout=TIMEOUT, **fresh_store())
        atexit.register(cleanup)
    return device


def fresh_store() -> dict:
    """Where the processes meet, as arguments of init_process_group, with names that no earlier attempt has used.

    torchrun keeps one store over its restarts: a process would find there the address of one that is dead, and wait.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    return {"store": dist.PrefixStore(agree(store, rank, world_size), store), "rank": rank, "world_size": world_size}


def agree(store, rank: int, world_size: int) -> str:
    """A name for this attempt, the same on all its processes; of earlier ones the store may still hold anything.

    Rank 0 offers a new name, the others accept it; then the offer is taken back, and only after that confirmed. So what
    stands there as an offer is never confirmed, and who accepted the offer of a dead process goes on looking.
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


def sum_numbers(numbers: list[float]) -> list[float]:
    """Sum plain numbers over ranks through gloo, without waiting for the device."""
    if not dist.is_initialized():
        return list(numbers)
    return all_reduce_sum(torch.tensor(numbers, dtype=torch.float64)).tolist()


def sum_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum over ranks a dict with the same keys and shapes everywhere, in one exchange."""
    if not dist.is_initialized() or not tensors:
        return tensors
    keys = sorted(tensors)
    flat = all_reduce_sum(torch.cat([tensors[key].float().reshape(-1) for key in keys]))
    parts = flat.split([tensors[key].numel() for key in keys])
    return {key: part.view(tensors[key].shape) for key, part in zip(keys, parts)}


def broadcast_object(value):
    """Rank 0's picklable value, on every rank (made by this program, never read from a file)."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def refuse_unless_shared(folder: Path) -> None:
    """UserError on all processes unless all of them see a folder that the main one sees."""
    barrier()
    blind = sum_numbers([float(not folder.is_dir())])[0]
    if blind:
        raise UserError(
            f"{int(blind)} of {world_size()} processes do not see {folder}: put --output_path on a disk "
            "that all machines share"
        )


@torch.no_grad()
def broadcast_weights(model: torch.nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if dist.is_initialized():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor, src=0)


@torch.no_grad()
def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sum .grad over ranks in flat buckets; a parameter that only some ranks touched counts as zero on the others."""
    if not dist.is_initialized():
        return
    touched = sum_numbers([p.grad is not None for p in parameters])
    for parameter, count in zip(parameters, touched):
        if count and parameter.grad is None:  # touched nowhere stays None, as on one process
            parameter.grad = torch.zeros_like(parameter)
    bucket, size = [], 0
    gradients = [p.grad for p in parameters if p.grad is not None]
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
        last = i + 1 == len(gradients) or gradients[i + 1].dtype != gradient.dtype
        if last or size >= BUCKET_BYTES:
            flat = all_reduce_sum(torch.cat([g.reshape(-1) for g in bucket]))
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(part.view_as(g))
            bucket, size = [], 0
