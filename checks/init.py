"""Does training start from a sensible place?"""

import dataclasses
import math

import torch

from checks.harness.model_under_test import ModelUnderTest, call, logits_of, next_tokens, require
from checks.harness.tiny_args import LAYERS

AFFORDABLE = 60e6  # parameters of a model of the author's width that is still built in a second


def loss_is_uniform(subject: ModelUnderTest):
    """Before training the task loss is near ln V: no token is preferred, none is known.

    Measured: at the author's own width with few layers (the error of a wrong scale grows with the width), and at the
    tiny size: within 0.75 nats above ln V and 0.25 below, on random tokens.
    Causes: an embedding table of standard deviation 1 that is also the output head; a head or an output scale that is
    too large; a loss that is a sum; below ln V: the targets leak into the input.
    """
    for model, where in _sizes(subject):
        ids = _random(model, rows=8)
        with torch.no_grad():
            _, loss, other_vars = call(model, ids, targets=next_tokens(ids))
        loss, uniform = subject.task_loss(loss, other_vars).item(), math.log(model.args.vocab_size)
        require(
            uniform - 0.25 < loss < uniform + 0.75, f"{where}: the initial loss is {loss:.3f}, ln V is {uniform:.3f}"
        )


@torch.no_grad()
def logits_are_centred(subject: ModelUnderTest):
    """The initial logits stand around zero and prefer no token.

    Measured: at the same two sizes, the mean of all logits (below 1) and the spread over the vocabulary of each token's
    mean logit (below 0.75).
    Causes: a bias of the head that does not start at zero; a last norm that is missing; a scale on the logits.
    """
    for model, where in _sizes(subject):
        logits = logits_of(model, _random(model, rows=8)).float()
        mean, spread = logits.mean().item(), logits.mean(dim=(0, 1)).std().item()
        require(abs(mean) < 1, f"{where}: the initial logits have mean {mean:.3g}")
        require(
            spread < 0.75,
            f"{where}: initial logits prefer some tokens everywhere, by a standard deviation of {spread:.3g}",
        )


def _random(model, rows):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(model.args.vocab_size, (rows, model.args.max_seq_len), generator=generator)


def _sizes(subject):
    """Yield (model, what size it is): the tiny one, and one of the author's width when it is affordable."""
    yield subject.build(sharp=False), "at the tiny size"
    try:
        default = subject.ModelArgs()
        few = {f.name: min(2, getattr(default, f.name)) for f in dataclasses.fields(default) if f.name in LAYERS}
        lists = [f for f in dataclasses.fields(default) if f.name in ("layer_types",) and getattr(default, f.name)]
        wide = subject.ModelArgs(vocab_size=997, max_seq_len=min(32, default.max_seq_len), **({} if lists else few))
        with torch.device("meta"):
            affordable = sum(p.numel() for p in subject.Model(wide).parameters()) < AFFORDABLE
        if not affordable:
            return
        torch.manual_seed(0)
        model = subject.Model(wide).eval()
        with torch.no_grad():
            model(_random(model, rows=1))
    except Exception:  # arguments that do not go together say nothing about the weights
        return
    yield model, "at the author's width"
