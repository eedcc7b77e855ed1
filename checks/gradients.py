"""Does every parameter learn, and is what it learns from the gradient of the loss?"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from checks.harness import ModelUnderTest, NotApplicable, call, next_tokens, require, train_steps
from model.basemodel import BaseModel

BOUNDS = {"activations": (1.6, 100), "gradients": (2.2, 5000)}  # factors from layer to layer, and from first to last
STEPS = 6  # after zero-initialised projections have left zero, the parameters behind them have a gradient too


def every_parameter_learns(tested: ModelUnderTest) -> None:
    """Every trainable parameter receives a finite gradient that is not zero; so does every expert, head and row of it.

    Measured: six optimizer steps from the author's initial weights on batches that hold every token of the vocabulary,
    the gradients gathered. Slices of stacked weights, and rows and columns of linear maps (a tenth of them or more),
    are judged on weights of unit gain as well, so that experts that the first steps rarely choose are not blamed.
    Causes: a parameter that forward does not use; a `.detach()`, `no_grad`, `.item()` or argmax on the way; a routing
    bias that is a Parameter where a buffer is meant; two factors that both start at zero; a top-1 weight that is
    divided by itself; experts that are never reached; a `.data` access.
    """
    initial = _gathered_gradients(tested, unit_gain=False)
    unit_gain = _gathered_gradients(tested, unit_gain=True)
    missing = [n for n, seen in initial.items() if seen is None]
    require(not missing, f"no gradient reaches {_names(missing)}")
    natural = {n: seen for n, seen in initial.items() if seen is not None}
    zero = [n for n, seen in natural.items() if not seen.any()]
    require(not zero, f"the gradient of {_names(zero)} is always zero")
    model = tested.build(unit_gain=False)
    linear = {n + ".weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, seen in natural.items():
        more = unit_gain[name]
        alive = seen if more is None else seen | more
        if alive.ndim >= 3:
            dead = (~alive.flatten(1).any(dim=1)).nonzero()[:, 0].tolist()
            require(not dead, f"no gradient ever reaches {name}[{', '.join(map(str, dead[:6]))}]")
        if name in linear and alive.shape[0] < tested.args.vocab_size:
            for dim, what in ((1, "rows"), (0, "columns")):
                dead = (~alive.any(dim=dim)).nonzero()[:, 0].tolist()
                total = alive.shape[1 - dim]
                require(
                    10 * len(dead) < total or not dead,
                    f"no gradient ever reaches the {what} {dead[:6]} of {name}, {len(dead)} of {total}",
                )


def _names(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _gathered_gradients(tested: ModelUnderTest, unit_gain: bool) -> dict[str, Tensor | None]:
    """Return {parameter: which of its elements ever had a gradient}, None for a parameter without any."""
    model = tested.build(unit_gain=unit_gain).train()
    seen: dict[str, Tensor | None] = {n: None for n, p in model.named_parameters() if p.requires_grad}

    def look(step: int) -> None:
        for name, param in model.named_parameters():
            if param.grad is not None and name in seen:
                require(param.grad.isfinite().all(), f"the gradient of {name} is non-finite in step {step + 1}")
                alive = param.grad != 0
                before = seen[name]
                seen[name] = alive if before is None else before | alive

    batches = [_every_token(tested, step) for step in range(STEPS)]
    train_steps(model, batches, lr=3e-3, after_backward=look)
    return seen


def _every_token(tested: ModelUnderTest, step: int) -> tuple[Tensor, Tensor]:
    """Return 16 sequences of random tokens that hold, as far as they go, each token of the vocabulary."""
    ids = tested.tokens(batch_size=16, seed=20 + step)
    every = torch.arange(tested.args.vocab_size)[: ids.numel()]
    ids.view(-1)[torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(step))[: len(every)]] = every
    return ids, next_tokens(ids)


def agree_with_finite_differences(tested: ModelUnderTest) -> None:
    """The gradient of the task loss is its derivative: backward agrees with a small step.

    Measured: for each parameter, the loss after small steps to both sides, along its gradient and along a random
    direction, against the gradient; steps over a jump (another expert is chosen) are made smaller, and left out when
    they still jump. A model whose gradients deliberately differ (straight-through rounding) declares it by the
    class attribute `gradients_are_exact = False`.
    Causes: a `.detach()` or `no_grad` on one of two paths, such as the residual stream or the routing weights; a custom
    backward that is off by a factor; an in-place edit through `.data`; a value computed in numpy or by `.item()`.
    """
    if not getattr(tested.Model, "gradients_are_exact", True):
        raise NotApplicable("the model declares gradients_are_exact = False")
    # Few tokens: each may change its experts within a step, and a sum of many small jumps would look like a slope.
    model, ids = tested.build(), tested.tokens(batch_size=1, length=min(8, tested.args.max_seq_len))
    targets = next_tokens(ids)

    def loss() -> Tensor:
        return tested.task_loss(*call(model, ids, targets=targets)[1:])

    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss(), [p for _, p in named], allow_unused=True)
    generator = torch.Generator().manual_seed(0)
    every = max(1, len(named) // 100)
    with torch.no_grad():
        base = loss().item()
        for (name, param), grad in list(zip(named, grads))[::every]:
            grad = torch.zeros_like(param) if grad is None else grad
            noise = torch.randn(param.shape, generator=generator)
            along = [("its gradient", grad / grad.norm())] if grad.norm() > 1e-4 else []
            for what, direction in [*along, ("a random direction", noise / noise.norm())]:
                expected = (grad * direction).sum().item()
                found = _slope(loss, base, param, direction, expected)
                if found is not None:
                    slope, noise_level = found
                    allowed = 0.1 * max(abs(slope), abs(expected)) + noise_level
                    require(
                        abs(slope - expected) <= allowed,
                        f"{name}: along {what} backward gives {expected:.4g}, a small "
                        f"step changes the loss by {slope:.4g} per unit",
                    )


def _slope(
    loss: Callable[[], Tensor], base: float, param: Tensor, direction: Tensor, expected: float
) -> tuple[float, float] | None:
    """Return (central difference of the loss along `direction`, its uncertainty); None where the loss jumps."""
    reach = 0.03 * max(param.norm().item(), 0.05 * param.numel() ** 0.5)
    step = min(reach, 2e-2 / max(abs(expected), 1e-12))
    original, slopes = param.clone(), []
    for _ in range(6):
        values = []
        for sign in (1, -1):
            param.copy_(original + sign * step * direction)
            values.append(loss().item())
        param.copy_(original)
        slope = (values[0] - values[1]) / (2 * step)
        rounding = 4e-6 * max(1.0, abs(base)) / step
        curvature = abs(values[0] + values[1] - 2 * base) / (2 * step)
        slopes.append(slope)
        # Three steps of different size that agree, on a segment that is nearly straight: this is the slope.
        if curvature < 0.3 * abs(slope) + rounding and len(slopes) > 2:
            if all(abs(s - slope) < 0.03 * abs(slope) + rounding for s in slopes[-3:-1]):
                return slope, rounding
        step /= 2
    return None


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
