"""A model sharded over the processes by FSDP2: each holds a shard of every parameter, its gradient and its moments.

The parameters of a layer are all-gathered when it computes and then freed; gradients are summed and scattered. Shards
are DTensors along dimension 0. On a model that is not sharded every function but `shard` does nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from utils.errors import UserError


def shard(model: torch.nn.Module, device: torch.device, precision: str, compiled: bool) -> None:
    """Shard `model.layers` one by one, then the rest of the model, and move the shards to `device`.

    The weights must be equal on all processes. compiled: compile each layer. UserError where sharding cannot work.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard  # slow to import, and few runs need it
    from torch.distributed.tensor import init_device_mesh

    if precision == "fp16":
        raise UserError(
            "--parallel=fsdp does not support --precision=fp16, whose loss scale each process would choose for "
            "itself: use bf16 or fp32"
        )
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise UserError(
            f"--parallel=fsdp needs a newer PyTorch than {torch.__version__}: pip install -r requirements.txt"
        )
    scalar = next((name for name, parameter in model.named_parameters() if not parameter.ndim), None)
    if scalar:
        raise UserError(f"--parallel=fsdp cannot shard {scalar}, a 0-d parameter: make it a vector of one element")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    modules: list[Any] = [*getattr(model, "layers", ()), model]
    for module in modules:
        if compiled and module is not model:
            module.compile(dynamic=False)
        fully_shard(module, mesh=mesh)
        # a sum, not a mean: each loss is already weighted by its share of the valid targets of the full step
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    modules[-1].set_reduce_scatter_unused_params(True)  # a model may use a parameter on some processes only
    model.to(device)  # the buffers


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` was applied to the model."""
    return hasattr(model, "set_requires_gradient_sync")


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether this process holds only a shard of the tensor."""
    return hasattr(tensor, "placements")  # a DTensor, without importing it


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, all-gathered; a collective call."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor; it shares the memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A full tensor that every process holds, sharded as `like` is; without communication."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)
    tensor = tensor.to(local(like).device)
    replicated = DTensor.from_local(tensor, like.device_mesh, [Replicate()], run_check=False)
    return replicated.redistribute(placements=like.placements)


def reshard(model: torch.nn.Module) -> None:
    """After forward passes without a backward: free the gathered parameters, which would become stale."""
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]


@contextmanager
def broadcast_logits(model: torch.nn.Module) -> Iterator[None]:
    """A context in which every process gets the logits of rank 0, so that all sample the same tokens."""

    def from_rank_0(_model: Any, _inputs: Any, output: tuple) -> tuple:
        logits = output[0].contiguous()
        dist.broadcast(logits, src=0)
        return logits, *output[1:]

    if not is_sharded(model):
        yield
        return
    hook = model.register_forward_hook(from_rank_0)
    try:
        with torch.compiler.set_stance("force_eager"):  # sequences grow by a token: a compiled graph for every length
            yield
    finally:
        hook.remove()
