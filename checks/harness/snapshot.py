"""What a module holds besides its parameters, and how it and torch are set, in a form that can be compared later."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

SKIPPED = {"_parameters", "_buffers", "_modules", "training"}
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {  # of torch: how to read and to set them
    "torch.is_grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.get_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.get_default_device": (torch.get_default_device, torch.set_default_device),
    "torch.get_float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch.are_deterministic_algorithms_enabled": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch.is_anomaly_enabled": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch.get_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.is_autocast_enabled": (
        partial(torch.is_autocast_enabled, "cpu"),
        partial(torch.set_autocast_enabled, "cpu"),
    ),
}


def settings() -> dict[str, Any]:
    """Return the settings of torch that hold for all models."""
    return {name: read() for name, (read, _) in SETTINGS.items()}


def restore_settings(before: dict[str, Any]) -> None:
    """Set those that differ back to what they were."""
    for name, (read, write) in SETTINGS.items():
        if read() != before[name]:
            write(before[name])


def switches(model: nn.Module) -> dict[str, Any]:
    """Return {what: value} of all that a call may not switch: modes, hooks, which tensors learn, settings of torch."""
    out = settings()
    for name, module in model.named_modules():
        hooks = [value for key, value in vars(module).items() if "hook" in key and isinstance(value, dict)]
        out[f"{name}.training".lstrip(".")] = module.training
        out[f"the number of hooks of {name or 'the model'}"] = sum(map(len, hooks))
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            full = f"{name}.{key}".lstrip(".")
            out[f"{full}.requires_grad"] = tensor is not None and tensor.requires_grad
            if key in module._parameters:
                out[f"{full} (the tensor itself)"] = hex(id(tensor))
                out[f"{full}.grad is None"] = tensor is None or tensor.grad is None
    return out


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return {"module.attribute": a comparable value} for every attribute of every submodule."""
    out = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in SKIPPED and not (key.startswith("_") and "hook" in key):
                out[f"{name}.{key}".lstrip(".")] = _value(value, depth=4)
        for key, value in module._buffers.items():
            out[f"{name}.{key}".lstrip(".")] = _value(value, depth=1)
    return out


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the attributes that appeared, vanished or changed."""
    names = sorted(before.keys() | after.keys())
    return [name for name in names if name not in before or name not in after or not _same(before[name], after[name])]


def _value(value: Any, depth: int) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, nn.Module) or depth == 0:
        return id(value)
    if isinstance(value, dict):
        return {repr(key): _value(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value(item, depth - 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if hasattr(value, "__dict__") and not callable(value):
        return {key: _value(item, depth - 1) for key, item in vars(value).items()}
    return id(value)


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other or one != one  # a nan that stays a nan is no change
