"""Is an architecture right? One file a group of checks, one function a check; the tests run all over every model.

A check takes a `Subject` and returns nothing, raises `CheckFailed` with what was seen, or `NotApplicable`. It knows the
model by its contract alone (model/basemodel.py).
"""

from . import causality, contract, gradients, packing, persistence, state
from .subject import CheckFailed, NotApplicable, Subject

CHECKS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": function
    for module in (contract, causality, gradients, state, packing, persistence)
    for name, function in vars(module).items()
    if callable(function) and getattr(function, "__module__", "") == module.__name__ and not name.startswith("_")
}

__all__ = ["CHECKS", "CheckFailed", "NotApplicable", "Subject"]
