"""Is an architecture right? One file per group of checks, one function per check; run by check_model.py and the tests.

A check takes a `ModelUnderTest` and returns nothing, raises `CheckFailed` with what was seen, or `NotApplicable`. It
knows the model by its contract alone (model/basemodel.py). Its docstring states what it proves, then "Measured:" and
"Causes:", the usual ones in order, separated by semicolons; the table prints them below a failure."""

from checks import (
    batch,
    causality,
    contract,
    counts,
    gradients,
    init,
    learning,
    loss,
    moe,
    packing,
    parts,
    persistence,
    precision,
    state,
)
from checks.harness.model_under_test import CheckFailed, ModelUnderTest, NotApplicable

GROUPS = (
    contract, loss, causality, batch, gradients, init, learning, state, packing, parts, persistence, precision, moe,
    counts,
)  # fmt: skip

CHECKS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": function
    for module in GROUPS
    for name, function in vars(module).items()
    if callable(function)
    and getattr(function, "__module__", "") == module.__name__
    and not name.startswith("_")
    and not isinstance(function, type)
}
SLOW = ("learning.", "precision.compiled", "init.", "gradients.agree")  # a second or more, not milliseconds
FAST = [name for name in CHECKS if not name.startswith((*SLOW, "state.", "precision.", "moe.b"))]  # what training needs

__all__ = ["CHECKS", "FAST", "SLOW", "CheckFailed", "NotApplicable", "ModelUnderTest"]
