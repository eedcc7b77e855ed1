"""What forward returned, looked at before it is used: an author's mistake is one line that names the file."""

import inspect
from pathlib import Path

import torch

from utils.errors import UserError


def checked(forward, Model: type, z_loss: float = 0.0):
    """Return `forward` with a look at what comes back: UserError unless it is (logits, loss, other_vars) as agreed."""

    def checked_forward(**batch):
        out = forward(**batch)
        problem = mistake(out)
        if not problem and z_loss and "loss/z" not in out[2]:
            problem = f"--z_loss={z_loss} needs a term loss/z: give `squares` to lm_loss, or set --z_loss=0"
        if problem:
            file = Path(inspect.getfile(Model))
            raise UserError(f"{file.parent.name}/{file.name}: {problem} (see forward in model/basemodel.py)")
        return out

    return checked_forward


def mistake(out) -> str | None:
    """What is wrong with the outputs of a forward pass with targets, or None."""
    form = "(logits, loss, other_vars)"
    if not isinstance(out, tuple) or len(out) != 3:
        what = f"{len(out)} values" if isinstance(out, (tuple, list)) else f"a {type(out).__name__}"
        return f"forward returns {what}, and must return three as a tuple: {form}"
    _, loss, other_vars = out
    if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.requires_grad:
        what = f"of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
        what = "without a graph" if isinstance(loss, torch.Tensor) and not loss.ndim else what
        return f"with targets the loss must be one number with its graph, and it is {what}"
    if not isinstance(other_vars, dict):
        return f"other_vars is a {type(other_vars).__name__}, and must be a dict of tensors"
    for name, value in other_vars.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            return f"other_vars[{name!r}] is a {type(value).__name__}, and must be a tensor: torch.tensor(value)"
    return None
