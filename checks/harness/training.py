"""The few optimizer steps that some checks take, the hooks called as the trainer calls them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.basemodel import BaseModel


def train_steps(
    model: BaseModel,
    batches: Sequence[tuple[Tensor, Tensor]],
    lr: float,
    after_backward: Callable[[int], None] | None = None,
) -> list[float]:
    """Take one AdamW step on the total loss of each (input_ids, targets) of `batches`; return the losses as floats.

    The optimizer gets what `param_groups` lists. after_backward: called with the step's number before each step.
    """
    params = [p for group in model.param_groups().values() for p in group]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    losses = []
    for step, (ids, targets) in enumerate(batches):
        model.before_step(step, len(batches))
        optimizer.zero_grad()
        _, loss, other_vars = model(ids, targets=targets)
        loss.backward()
        if after_backward is not None:
            after_backward(step)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        model.after_step({k: v.detach() for k, v in other_vars.items()})
        losses.append(loss.item())
    return losses
