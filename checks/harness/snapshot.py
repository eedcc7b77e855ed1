"""What a module holds besides its parameters, in a form that can be compared later."""

from typing import Any

import torch
from torch import Tensor, nn

SKIPPED = {"_parameters", "_buffers", "_modules", "training"}


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
