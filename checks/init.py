"""Does training start from a sensible place?"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from checks.harness import ModelUnderTest, NotApplicable, call, logits_of, next_tokens, require
from checks.harness.tiny_args import LAYERS
from model.basemodel import BaseModel, BaseModelArgs
from utils.errors import UserError

AFFORDABLE = 60e6  # parameters of a model of the author's width that is still built in a second


def loss_is_uniform(tested: ModelUnderTest) -> None:
    """Before training the task loss is near ln V: no token is preferred.

    Measured: at the author's own width with few layers (the error of a wrong scale grows with the width), and at the
    tiny size: within 0.75 nats above ln V and 0.25 below, on random tokens.
    Causes: an embedding table of standard deviation 1 that is also the output head; a head or an output scale that is
    too large; a loss that is a sum; below ln V: the targets leak into the input.
    """
    for model, where in _sizes(tested):
        ids = _random(model, batch_size=8)
        with torch.no_grad():
            _, loss, other_vars = call(model, ids, targets=next_tokens(ids))
        loss, uniform = tested.task_loss(loss, other_vars).item(), math.log(model.args.vocab_size)
        require(
            uniform - 0.25 < loss < uniform + 0.75, f"{where}: the initial loss is {loss:.3f}, ln V is {uniform:.3f}"
        )


@torch.no_grad()
def logits_are_centred(tested: ModelUnderTest) -> None:
    """The initial logits are centred at zero and prefer no token.

    Measured: at the same two sizes, the mean of all logits (below 1) and the spread over the vocabulary of each token's
    mean logit (below 0.75).
    Causes: a bias of the head that does not start at zero; a last norm that is missing; a scale on the logits.
    """
    for model, where in _sizes(tested):
        logits = logits_of(model, _random(model, batch_size=8)).float()
        mean, spread = logits.mean().item(), logits.mean(dim=(0, 1)).std().item()
        require(abs(mean) < 1, f"{where}: the initial logits have mean {mean:.3g}")
        require(
            spread < 0.75,
            f"{where}: initial logits prefer some tokens everywhere, by a standard deviation of {spread:.3g}",
        )


def _random(model: BaseModel, batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(model.args.vocab_size, (batch_size, model.args.max_seq_len), generator=generator)


def _sizes(tested: ModelUnderTest) -> Iterator[tuple[BaseModel, str]]:
    """Yield (model, what size it is): the tiny one, and one of the author's width when it is affordable.

    What the model raises at the author's width passes through: it is a bug that the tiny size hides.
    """
    yield tested.build(unit_gain=False), "at the tiny size"
    args = _wide_args(tested)
    if args is None:
        return
    try:
        with torch.device("meta"):
            n_params = sum(p.numel() for p in tested.Model(args).parameters())
    except (NotImplementedError, RuntimeError) as error:
        raise NotApplicable(f"right at the tiny size; at the author's width it cannot be built: {error}") from error
    if n_params < AFFORDABLE:
        torch.manual_seed(0)
        yield tested.Model(args).eval(), "at the author's width"


def _wide_args(tested: ModelUnderTest) -> BaseModelArgs | None:
    """Return args of the author's width with two layers; None where the author's own rules refuse so few."""
    default = tested.ModelArgs()
    fields = dataclasses.fields(default)
    few = {f.name: min(2, getattr(default, f.name)) for f in fields if f.name in LAYERS}
    if getattr(default, "layer_types", None):  # one entry per layer: the depth stays
        few = {}
    try:
        return tested.ModelArgs(vocab_size=997, max_seq_len=min(32, default.max_seq_len), **few)
    except (UserError, ValueError, AssertionError):
        return None
