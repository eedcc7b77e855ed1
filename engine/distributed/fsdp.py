"""A model shared out over the processes (FSDP2): each keeps a part of every parameter, its gradient and its moments.

A layer's parameters are gathered when it computes and let go again; gradients are summed and handed back in parts. The
parts are DTensors, cut along dimension 0. On a model that is not shared out every function but `shard` does nothing.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist

from utils.errors import UserError


def shard(model: torch.nn.Module, device: torch.device, precision: str, compiled: bool) -> None:
    """Share out `model.layers` one by one, then what is left, and move the parts to `device`.

    The weights must be the same on all processes. compiled: compile each layer. UserError where it cannot work.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard  # slow to import, and few runs need it
    from torch.distributed.tensor import init_device_mesh

    if precision == "fp16":
        raise UserError(
            "--parallel=fsdp does not go with --precision=fp16, whose scale each process would choose for "
            "itself: use bf16 or fp32"
        )
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise UserError(
            f"--parallel=fsdp needs a newer PyTorch than {torch.__version__}: pip install -r requirements.txt"
        )
    flat = next((name for name, parameter in model.named_parameters() if not parameter.ndim), None)
    if flat:
        raise UserError(f"--parallel=fsdp cannot cut {flat}, which has no dimension: make it a vector of one number")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = list(getattr(model, "layers", ()))
    for part in [*layers, model]:
        if compiled and part is not model:
            part.compile(dynamic=False)
        fully_shard(part, mesh=mesh)
        # a sum, not a mean: each loss is weighted by its share of the valid targets of the whole step already
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    model.set_reduce_scatter_unused_params(True)  # a plugin may touch a parameter on some processes only
    model.to(device)  # buffers that belong to no parameter


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` has been here."""
    return hasattr(model, "set_requires_gradient_sync")


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    return hasattr(tensor, "placements")  # a DTensor, without its import


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered from all processes, all of which must ask for it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor; it shares the memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor that every process has, cut as `like` is; nothing is sent."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    tensor = tensor.to(local(like).device)
    everywhere = DTensor.from_local(tensor, like.device_mesh, [Replicate()], run_check=False)
    return everywhere.redistribute(placements=like.placements)


def reshard(model: torch.nn.Module) -> None:
    """After forward passes without a backward one: forget the gathered parameters, which are going to change."""
    if is_sharded(model):
        model.reshard()


@contextmanager
def broadcast_logits(model: torch.nn.Module):
    """Within the block every process sees the logits of the first, so that they all choose the same tokens."""

    def first(_model, _inputs, output):
        logits = output[0].contiguous()
        dist.broadcast(logits, src=0)
        return logits, *output[1:]

    if not is_sharded(model):
        yield
        return
    hook = model.register_forward_hook(first)
    try:
        with torch.compiler.set_stance("force_eager"):  # the text grows by a token: no program for every length
            yield
    finally:
        hook.remove()
