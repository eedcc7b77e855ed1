"""Does every parameter learn?"""

import math

from .subject import require


def every_parameter_learns(subject):
    """Every trainable parameter receives a finite gradient that is not zero, on a batch with tokens for all experts."""
    model, ids = subject.build().train(), subject.tokens(rows=16)
    model(ids, targets=ids.roll(-1, 1))[1].backward()
    for name, param in model.named_parameters():
        if param.requires_grad:
            require(param.grad is not None, f"{name} receives no gradient")
            require(param.grad.isfinite().all(), f"the gradient of {name} is not finite")
            require(param.grad.abs().max() > 0, f"the gradient of {name} is zero")


def initial_loss_is_uniform(subject):
    """Before training the task loss is near ln V: no token is preferred."""
    model, ids = subject.build(sharp=False), subject.tokens(rows=16)
    _, loss, other_vars = model(ids, targets=ids.roll(-1, 1))
    loss, uniform = other_vars.get("loss/ce", loss).item(), math.log(subject.args.vocab_size)
    require(abs(loss - uniform) < 0.1 * uniform, f"the initial loss is {loss:.3f}, ln V is {uniform:.3f}")
