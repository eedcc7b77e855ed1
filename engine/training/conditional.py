"""Updates that happen only where a 0-d bool on the device is true, bit for bit: the host does not wait for it."""

import torch


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: a CPU masks several of those at a time, unlike in torch.where."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def zero_unless(good: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Zero `tensor` in place, NaN included, where `good`, 0-d bool, is false; return it."""
    integers = as_integers(tensor)
    integers.bitwise_and_(-good.to(integers.dtype))
    return tensor


def copy_if(good: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> None:
    """Overwrite `old` by `new` where `good`, 0-d bool, is true: old ^ ((new ^ old) & mask). `new` is destroyed."""
    new, old = as_integers(new), as_integers(old)
    old.bitwise_xor_(new.bitwise_xor_(old).bitwise_and_(-good.to(new.dtype)))
