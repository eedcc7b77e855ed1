"""A model in float64, whose rounding is 2e-9 of that in fp32: what is left of a gradient there is real."""

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from checks.harness.model_under_test import NotApplicable, next_tokens
from model.basemodel import BaseModel

WIDER = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
}
ADDS_EPSILON = {"add", "add_", "native_layer_norm", "_fused_rms_norm", "native_group_norm", "native_batch_norm"}
LARGEST_EPSILON = 1e-3
SMALLER = 1e-10


class Float64(TorchDispatchMode):
    """Within the block all real numbers are float64, whatever type a model asks for: `.float()` gives float64.

    without_epsilons: small constants that are added, to a variance or a sum of weights, are 1e10 times smaller. What a
    norm cancels but for its epsilon is then cancelled but for rounding.
    """

    def __init__(self, without_epsilons: bool = False) -> None:
        super().__init__()
        self.without_epsilons = without_epsilons

    def __enter__(self) -> "Float64":
        self.default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        torch.set_default_dtype(self.default_dtype)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_view, written = _form(func)
        kwargs = kwargs or {}
        if not is_view:
            args = tuple(a if index in written else _wide(a) for index, a in enumerate(args))
            kwargs = {key: value if key in written else _wide(value) for key, value in kwargs.items()}
        if self.without_epsilons and func._schema.name.removeprefix("aten::") in ADDS_EPSILON:
            args = tuple(a * SMALLER if isinstance(a, float) and 0 < a <= LARGEST_EPSILON else a for a in args)
        return func(*args, **kwargs)


@functools.cache
def _form(func: OpOverload) -> tuple[bool, frozenset[int | str]]:
    """Return (whether the operator returns a view, the positions and names of the arguments that it writes to)."""
    arguments = func._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    is_view = not written and any(a.alias_info is not None for a in arguments)
    return is_view, frozenset([*written, *(arguments[i].name for i in written)])


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return WIDER.get(value, value)
    if isinstance(value, Tensor):
        return value.to(WIDER[value.dtype]) if value.dtype in WIDER else value
    if isinstance(value, (list, tuple)):
        return [_wide(item) for item in value]
    return value


def in_float64(build: Callable[[], BaseModel], ids: Tensor) -> BaseModel:
    """Return the model of `build()` with the same weights in float64; use it within `Float64()` only.

    Raises `NotApplicable` with the reason where it does not run in float64 on `ids` (B, T).
    """
    narrow = build()
    try:
        with Float64():
            wide = build()
            wide.load_state_dict(narrow.state_dict())
            wide(ids, targets=next_tokens(ids))[1].backward()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise NotApplicable(f"the model does not run in float64: {reason}") from error
    wide.zero_grad()
    return wide
