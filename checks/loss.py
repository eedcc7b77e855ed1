"""Is the loss the mean cross-entropy of the next token over the targets that count?"""

import torch
from torch import Tensor

from checks.harness import ModelUnderTest, call, logits_of, next_tokens, require, require_close
from checks.harness.model_under_test import LONG, negative_log_likelihood
from model.basemodel import BaseModel


def mean_over_valid_targets(tested: ModelUnderTest) -> None:
    """The task loss is the mean of -log p(target) over targets that are not -100, in train and in eval mode.

    Measured: against float64 by hand, from the logits of a call without targets; some targets, and one full sequence,
    are ignored, and the loss is a mean over tokens, not a mean over sequences.
    Causes: targets shifted a second time (the data layer has shifted them); the sum divided by all positions instead of
    the valid ones; a mean of the sequences' means; -100 taken as a class; label smoothing, capping or scaling of the
    logits on one path only; an auxiliary loss inside the term (report it as `loss/<name>` of its own)."""
    ids = tested.tokens()
    targets = next_tokens(ids)
    targets[0, ::2] = -100
    targets[1] = -100
    for train in (False, True):
        model = tested.build().train(train)
        torch.manual_seed(3)
        with torch.no_grad():
            logits = logits_of(model, ids)
            torch.manual_seed(3)  # the same dropout
            _, loss, other_vars = call(model, ids, targets=targets)
        got, want = tested.task_loss(loss, other_vars).double(), negative_log_likelihood(logits, targets).mean()
        if train and _is_noisy(model, ids):
            continue
        if not torch.isclose(got, want, rtol=1e-4, atol=1e-4):
            why = _explain(got.item(), logits, targets)
            mode = "train" if train else "eval"
            valid = int((targets != -100).sum())
            require(
                False,
                f"{mode} mode: the loss is {got:.5g}, the mean over the {valid} valid targets {want:.5g}"
                f"{': it is ' + why if why else ''}",
                [why] if why else [],
            )


@torch.no_grad()
def long_sequences(tested: ModelUnderTest) -> None:
    """Over 300 tokens the task loss, in train and in eval mode, is that of the logits without targets.

    Measured: as `mean_over_valid_targets`, beyond windows and chunks.
    Causes: a form of its own for training, such as a recurrence in chunks or attention in blocks, that differs from
    the one for inference where one chunk hands over to the next."""
    model, ids = tested.build_long(), tested.tokens(batch_size=2, length=LONG)
    want = negative_log_likelihood(logits_of(model, ids), next_tokens(ids)).mean()
    for train in (False, True):
        model.train(train)
        got = tested.task_loss(*call(model, ids, targets=next_tokens(ids))[1:]).double()
        if train and _is_noisy(model, ids):
            continue
        mode = "train" if train else "eval"
        require_close(got, want, f"{mode} mode: loss of {LONG} tokens against that of the logits without targets", 2e-5)


@torch.no_grad()
def _is_noisy(model: BaseModel, ids: Tensor) -> bool:
    """Return whether two calls in the model's present mode differ."""
    return not torch.equal(logits_of(model, ids), logits_of(model, ids))


def _explain(got: float, logits: Tensor, targets: Tensor) -> str:
    """Return which usual mistake gives the value `got`, or ""."""
    nll = negative_log_likelihood(logits, targets)
    plain = -logits.double().log_softmax(-1)  # (B, T, V)
    per_sequence = [negative_log_likelihood(logits[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]
    zero_class = torch.cat((nll, plain[..., 0][targets == -100]))
    guesses = {
        "the sum over the valid targets": nll.sum(),
        "the sum divided by all positions, ignored ones included": nll.sum() / targets.numel(),
        "the mean of the sequences' means": torch.stack([r.mean() for r in per_sequence if len(r)]).mean(),
        "the mean of the sequences' means, a sequence without targets counted as 0": torch.stack(
            [r.mean() if len(r) else nll.new_zeros(()) for r in per_sequence]
        ).mean(),
        "the mean with -100 taken as class 0": zero_class.mean(),
        "the loss of targets shifted a second time": negative_log_likelihood(logits[:, :-1], targets[:, 1:]).mean(),
        "the loss of targets shifted back": negative_log_likelihood(logits[:, 1:], targets[:, :-1]).mean(),
        "in bits, not nats": nll.mean() / torch.log(torch.tensor(2.0)),
        "that of base-10 logarithms": nll.mean() / torch.log(torch.tensor(10.0)),
        "the perplexity": nll.mean().exp(),
        "the mean over the batch of the sums over the sequence": nll.sum() / len(targets),
    }
    for epsilon in (0.05, 0.1, 0.2):
        smooth = (1 - epsilon) * nll.mean() + epsilon * plain[targets != -100].mean()
        guesses[f"the loss with label smoothing of {epsilon}"] = smooth
    return next((why for why, value in guesses.items() if abs(value.item() - got) < 1e-3 * max(1.0, abs(got))), "")


def nothing_to_predict(tested: ModelUnderTest) -> None:
    """A sequence, and a full batch, whose targets are all ignored gives a finite loss, 0 for the batch, without
    gradient.

    Measured: the task loss and its gradients with all targets -100, in train and eval mode; then a batch with one such
    sequence among others.
    Causes: a division by the number of valid targets without `.clamp(min=1)`: 0 / 0; `cross_entropy` with its default
    mean, which is NaN here; a constant 0 returned without a graph, on which backward fails."""
    ids = tested.tokens()
    for train in (False, True):
        model = tested.build().train(train)
        _, loss, other_vars = call(model, ids, targets=torch.full_like(ids, -100))
        for key, value in {"loss": loss, **other_vars}.items():
            require(value.isfinite().all(), f"{key} is {value.flatten()[0].item()} although no target is valid")
        task = tested.task_loss(loss, other_vars)
        require(task.item() == 0.0, f"the loss is {task.item():.4g} although no target is valid")
        require(loss.requires_grad, "the loss of a batch without valid targets has no graph: backward fails on it")
        _no_gradient(model, task)
        targets = next_tokens(ids)
        targets[1] = -100
        model.zero_grad()
        loss = call(model, ids, targets=targets)[1]
        require(loss.isfinite(), f"the loss is {loss.item()} with one sequence without targets")
        loss.backward()
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        require(not bad, f"one sequence without targets: the gradient of {', '.join(bad[:4])} is not finite")


def _no_gradient(model: BaseModel, task: Tensor) -> None:
    if not task.requires_grad:
        return
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(task, [p for _, p in named], retain_graph=True, allow_unused=True)
    for (name, _), grad in zip(named, grads):
        worst = 0.0 if grad is None else grad.abs().max().item()
        require(worst == 0.0, f"the gradient of {name} is {worst:.3g} although no target is valid")


def ignored_targets_have_no_gradient(tested: ModelUnderTest) -> None:
    """The gradient of the task loss is that of the valid targets alone.

    Measured: the loss of a batch with half of its sequences ignored, and its gradient, against those of the others
    alone.
    Causes: a mask applied to the loss but not to the auxiliary path; ignored targets clamped to class 0; a custom
    backward that forgets the mask or the division by the number of valid targets."""
    tested.needs_repeatable_backward()
    model, ids = tested.build(), tested.tokens(batch_size=4)
    targets = next_tokens(ids)
    targets[2:] = -100

    def loss_and_gradient(ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        _, loss, other_vars = call(model, ids, targets=targets)
        task = tested.task_loss(loss, other_vars)
        params = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(task, params, allow_unused=True)
        return task.detach(), torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(params, grads)]
        )

    both, alone = loss_and_gradient(ids, targets), loss_and_gradient(ids[:2], targets[:2])
    require_close(both[0], alone[0], "loss with ignored sequences against the loss without them")
    require_close(both[1], alone[1], "gradient with ignored sequences against the gradient without them", 1e-3)
