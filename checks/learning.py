"""Does it learn? Every component can be right and the model still not learn."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from checks.harness import ModelUnderTest, call, require, train_steps

Batch = tuple[Tensor, Tensor]  # input_ids and targets
RATES = (1e-2, 3e-3)  # one of them suits: an architecture is not blamed for its learning rate


def overfits_one_batch(tested: ModelUnderTest) -> None:
    """It memorizes two short sequences.

    Measured: AdamW on the same two sequences of random tokens; the task loss must fall below 0.3 ln V within 150 steps,
    at one of two learning rates.
    Causes: gradients with the wrong sign or of something else; parameters that `param_groups` leaves out; outputs that
    are capped too tightly; noise that drowns the signal; a loss that counts other targets than it should."""
    ids = tested.tokens(batch_size=2, length=min(13, tested.args.max_seq_len + 1), seed=4)
    batch, bound = (ids[:, :-1], ids[:, 1:]), 0.3 * math.log(tested.args.vocab_size)
    best = _best_loss(tested, batch, lambda step: batch, bound)
    require(
        best < bound,
        f"the loss on two sequences of {batch[0].shape[1]} tokens is still {best:.3f} after 150 steps, "
        f"it began near {math.log(tested.args.vocab_size):.3f}",
    )


def recalls_the_past(tested: ModelUnderTest) -> None:
    """It learns a copy task that needs the past: repeat a token from up to three positions before.

    Measured: sequences of one of eight tokens and three fillers; at each filler the target is that token. A model that
    cannot look back stays at ln 8 = 2.08; the loss must fall below 1.2 within 150 steps on fresh sequences.
    Causes: a mask that hides the past; values that never reach the stream; a recurrent state or a cumulative sum that
    starts again at each position; attention whose output is thrown away."""
    generator = torch.Generator().manual_seed(5)
    length = min(4, tested.args.max_seq_len)

    def batch(step: int) -> Batch:
        token = torch.randint(8, (32, 1), generator=generator)
        ids = torch.full((32, length), 9)
        ids[:, :1] = token
        targets = token.expand(-1, length).clone()
        targets[:, 0] = -100
        return ids, targets

    best = _best_loss(tested, batch(0), batch, 1.2)
    require(
        best < 1.2,
        f"the loss of recalling a token up to three positions back is {best:.3f} after 150 steps; "
        "without the past it is 2.079",
    )


def _best_loss(tested: ModelUnderTest, test: Batch, batch_at: Callable[[int], Batch], bound: float) -> float:
    """Return the task loss on `test` after training on batch_at(step), the best over the learning rates."""
    best = float("inf")
    for lr in RATES:
        model = tested.build(unit_gain=False).train()
        for start in range(0, 150, 50):
            train_steps(model, [batch_at(step) for step in range(start, start + 50)], lr)
            with torch.no_grad():
                loss = tested.task_loss(*call(model.eval(), test[0], targets=test[1])[1:]).item()
            model.train()
            best = min(best, loss) if math.isfinite(loss) else best
            if best < bound:
                return best
    return best


def one_step_moves_every_group(tested: ModelUnderTest) -> None:
    """One optimizer step moves parameters of every group, and nothing becomes NaN.

    Measured: one AdamW step over `param_groups()`, weights before and after.
    Causes: a group that lists copies or views instead of the parameters; a group whose parameters have no gradient.
    """
    model = tested.build().train()
    groups = model.param_groups()
    before = {name: [p.detach().clone() for p in params] for name, params in groups.items()}
    ids = tested.tokens(batch_size=8)
    train_steps(model, [(ids, ids.roll(-1, 1))], lr=1e-3)
    for name, params in groups.items():
        moved = [not torch.equal(p, old) for p, old in zip(params, before[name])]
        require(not params or any(moved), f"no parameter of the group {name!r} moves")
        finite = all(p.isfinite().all() for p in params)
        require(finite, f"a parameter of the group {name!r} is not finite after a step")
    own = {id(p) for p in model.parameters()}
    foreign = [name for name, params in groups.items() if any(id(p) not in own for p in params)]
    require(not foreign, f"the groups {', '.join(foreign)} list tensors that are not parameters of the model")
