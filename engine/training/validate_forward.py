"""Check what forward returns before it is used: a mistake of a model's author becomes one line that names the file."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError

FORM = "(logits, loss, other_vars)"


def checked(forward: Callable[..., Any], Model: type, z_loss: float = 0.0) -> Callable[..., Any]:
    """Return `forward` with a check of its outputs: UserError unless they are (logits, loss, other_vars) as agreed.

    z_loss: the weight of the z-loss; unless 0, other_vars must hold "loss/z".
    """

    def checked_forward(**batch: torch.Tensor) -> Any:
        outputs = forward(**batch)
        problem = mistake(outputs)
        if not problem and z_loss and "loss/z" not in outputs[2]:
            problem = f"--z_loss={z_loss} needs a term loss/z: give `squares` to lm_loss, or set --z_loss=0"
        if problem:
            file = Path(inspect.getfile(Model))
            raise UserError(f"{file.parent.name}/{file.name}: {problem} (see forward in model/basemodel.py)")
        return outputs

    return checked_forward


def mistake(outputs: object) -> str | None:
    """The error in the outputs of a forward pass with targets, or None."""
    if not isinstance(outputs, tuple) or len(outputs) != 3:
        what = f"{len(outputs)} values" if isinstance(outputs, (tuple, list)) else f"a {type(outputs).__name__}"
        return f"forward returns {what}, and must return three as a tuple: {FORM}"
    _, loss, other_vars = outputs
    if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.requires_grad:
        what = f"of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
        what = "without a graph" if isinstance(loss, torch.Tensor) and not loss.ndim else what
        return f"with targets the loss must be 0-d with its graph, and it is {what}"
    if not isinstance(other_vars, dict):
        return f"other_vars is a {type(other_vars).__name__}, and must be a dict of tensors"
    for name, value in other_vars.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            return f"other_vars[{name!r}] is a {type(value).__name__}, and must be a tensor: torch.tensor(value)"
    return None
