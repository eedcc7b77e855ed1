"""The small models that checks run on, and the runner. This module has the names that most checks use."""

from checks.harness.model_under_test import (
    ModelUnderTest,
    NotApplicable,
    call,
    logits_of,
    next_tokens,
    require,
    require_close,
)
from checks.harness.training import train_steps

__all__ = [
    "ModelUnderTest", "NotApplicable", "call", "logits_of", "next_tokens", "require", "require_close", "train_steps",
]  # fmt: skip
