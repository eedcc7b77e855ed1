"""Does every parameter learn, and is what it learns from the gradient of the loss?"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from checks.harness import ModelUnderTest, NotApplicable, call, next_tokens, require, train_steps
from checks.harness.derivative import Derivative
from checks.harness.model_under_test import LONG, REPEATS
from checks.harness.reached import dead_slices, gathered_gradients, reached_in_a_larger_model
from model.basemodel import BaseModel

BOUNDS = {"activations": (1.6, 100), "gradients": (2.2, 5000)}  # factors from layer to layer, and from first to last


def every_parameter_learns(tested: ModelUnderTest) -> None:
    """Every trainable parameter receives a finite gradient that is not zero; so does every slice of a table or a stack.

    Measured: optimizer steps from the author's initial weights, and from weights of unit gain, on batches that hold
    every token of the vocabulary; the gradients of the same steps in float64, without epsilons: one that vanishes
    there is rounding. Rows, columns, experts, heads and taps of all weights of two dimensions or more (a tenth of them
    or more) must be reached from one of the two, and are given more steps while further ones are reached; what a
    larger vocabulary and longer sequences reach is not blamed.
    Causes: a parameter that forward does not use; a `.detach()`, `no_grad`, `.item()` or argmax on the way; a routing
    bias that is a Parameter where a buffer is meant; two factors that both start at zero; a top-1 weight that is
    divided by itself; experts that are never reached; a `.data` access.
    """
    initial = gathered_gradients(tested, unit_gain=False)
    unit_gain = gathered_gradients(tested, unit_gain=True)
    missing = [name for name, seen in initial.items() if seen is None]
    require(not missing, f"no gradient reaches {_names(missing)}")
    pairs = [(name, seen, unit_gain[name]) for name, seen in initial.items() if seen is not None]
    zero = [name for name, seen, _ in pairs if not seen.fp32.any()]
    require(not zero, f"the gradient of {_names(zero)} is always zero")
    for name, seen, more in pairs:
        require(
            not seen.vanishes() or (more is not None and not more.vanishes()),
            f"the gradient of {name} vanishes: at most {seen.fp32.max():.2g} in fp32, which is rounding or the epsilon "
            f"of a norm, and {seen.float64.max():.2g} in float64 without epsilons",
            [
                "a softmax over the keys or the vocabulary cancels it, as it does the bias of keys without positions",
                "the norm after it cancels it: a scale, or for LayerNorm a constant",
                "a weight that is divided by itself, such as that of one active expert",
            ],
        )
    dead = {name: (dead_slices(seen, more), seen) for name, seen, more in pairs}
    if any(found for found, _ in dead.values()):
        larger = reached_in_a_larger_model(tested)
        for name, (found, seen) in dead.items():
            for slices in found:
                require(
                    slices.is_reached_by(larger.get(name)),
                    f"no gradient ever reaches {slices.text(name, seen.fp32.ndim)}",
                )


def _names(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def agree_with_finite_differences(tested: ModelUnderTest) -> None:
    """The gradient of the task loss is its derivative: backward agrees with a small step.

    Measured: in float64, the change of the loss after small steps to both sides against the gradient: along each
    parameter over eight tokens, and along all at once over 293, beyond windows and chunks, in eval and train mode with
    the same noise. Steps over a jump (another expert is chosen) are made smaller, and left out when they still jump.
    The gradients of fp32 against those of float64. A model whose gradients deliberately differ (straight-through
    rounding) declares it by the class attribute `gradients_are_exact = False`.
    Causes: a `.detach()` or `no_grad` on one of two paths, such as the residual stream, the routing weights or the
    state that one chunk hands to the next; a custom backward that is off by a factor, or right for one chunk only; an
    in-place edit through `.data`; a value computed in numpy or by `.item()`.
    """
    if not tested.Model.gradients_are_exact:
        raise NotApplicable("the model declares gradients_are_exact = False")
    tested.needs_repeatable_backward()
    few = tested.tokens(batch_size=1, length=min(8, tested.args.max_seq_len))
    short = Derivative(tested, tested.build, few, train=False)
    short.require_fp32_agrees()
    names = list(short.params)
    for name in names[:: -max(1, len(names) // 100)]:
        short.require_agrees([name], trials=1)
    try:
        build, length = tested.build_long, LONG - 7  # 293 is a prime: a multiple of no chunk
        build()
    except NotApplicable:
        build, length = tested.build, tested.args.max_seq_len
    for train in (False, True):
        long = Derivative(tested, build, tested.tokens(batch_size=1, length=length), train)
        long.require_fp32_agrees()
        long.require_agrees(names, trials=2)


def backward_is_deterministic(tested: ModelUnderTest) -> None:
    """Two backward passes give the same gradient.

    Measured: the gradient of the loss twice through one graph, and from a second forward pass with the same seed, in
    eval and train mode. Checks that compare gradients do not apply where they differ.
    Causes: a custom backward that draws noise, counts its calls or writes to the tensors it saved; recomputation with
    other noise (`checkpoint(..., preserve_rng_state=False)`); noise of Python or numpy, which no seed of torch reaches;
    a value kept on the module or in the file from call to call.
    """
    for what, difference in tested.backward_differences.items():
        require(difference < REPEATS, f"{what}: the gradients differ by {difference:.2%}, so backward is random")


def norms_per_layer(tested: ModelUnderTest) -> None:
    """Activations and gradients keep their scale from the first layer to the last, at the initial weights.

    Measured: the root mean square of each layer's output, and of the gradient at it, in a model of twelve layers. From
    one layer to the next activations may change by a factor of 1.6 on average and gradients by 2.2, and in all by 100
    and by 5000: twelve plain GRUs on top of each other are just within.
    Causes: a missing norm before a sublayer; a residual connection that is missing, detached or added twice; initial
    weights that are too large or too small; residual projections that are not scaled with depth.
    """
    model, ids = _deep(tested).train(), tested.tokens(batch_size=4)
    sizes = _sizes_per_layer(model, ids)
    if not any(sizes["gradients"]):  # an output head that starts at zero lets nothing through in the first step
        train_steps(model, [(ids, next_tokens(ids))] * 3, lr=1e-3)
        sizes = _sizes_per_layer(model, ids)
    for what, rms in sizes.items():
        ratio = rms[-1] / rms[0] if rms[0] else float("inf")
        per_layer = ratio ** (1 / (len(rms) - 1)) if ratio > 0 else 0.0
        seen = f"{what} per layer have root mean squares " + " ".join(f"{r:.2g}" for r in rms)
        step, overall = BOUNDS[what]
        require(
            1 / step < per_layer < step and 1 / overall < ratio < overall, f"{seen}: a factor of {ratio:.3g} in total"
        )


def _sizes_per_layer(model: BaseModel, ids: Tensor) -> dict[str, list[float]]:
    """Return the root mean squares of activations and gradients at the outputs of `self.layers`, in order."""
    outputs = []

    def keep(module: nn.Module, args: tuple, out: object) -> None:
        first = next((t for t in _flat(out) if isinstance(t, Tensor) and t.ndim >= 3), None)
        if first is not None and first.requires_grad:
            first.retain_grad()
            outputs.append(first)

    handles = [layer.register_forward_hook(keep) for layer in getattr(model, "layers", ())]
    loss = call(model, ids, targets=next_tokens(ids))[1]
    for handle in handles:
        handle.remove()
    if len(outputs) < 3:
        raise NotApplicable("fewer than three outputs of self.layers to compare")
    loss.backward()
    tensors: dict[str, list[Tensor | None]] = {
        "activations": [x.detach() for x in outputs],
        "gradients": [x.grad for x in outputs],
    }
    return {what: [0.0 if x is None else x.square().mean().sqrt().item() for x in xs] for what, xs in tensors.items()}


def _flat(out: Any) -> Iterable:
    if isinstance(out, dict):
        return out.values()
    if isinstance(out, (tuple, list)):
        return out
    return [out]


def _deep(tested: ModelUnderTest) -> BaseModel:
    """Return a model of twelve layers where the arguments allow it, else the tiny one."""
    for name in ("n_layers", "n_layer", "num_layers", "num_hidden_layers", "depth", "n_blocks"):
        if hasattr(tested.args, name):
            try:
                model = tested.build(unit_gain=False, **{name: 12})
                with torch.no_grad():
                    model(tested.tokens(batch_size=1))
                return model
            except Exception:
                break
    return tested.build(unit_gain=False)
