"""The task loss as a function of the parameters: its gradient by backward against what small steps change."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from checks.harness.float64 import Float64, in_float64
from checks.harness.model_under_test import ModelUnderTest, call, next_tokens, require
from model.basemodel import BaseModel

CHANGE = 1e-6  # nats by which the step along one parameter is to change the loss
REACH = 1e-4  # the longest step, in parts of the parameter
TOLERANCE = 2e-3  # in float64 both agree to 1e-6
ROUNDING = 1e-13  # of a loss in float64
SHRINKS = 8  # a step over a jump, where another expert is chosen, is made this much smaller


class Derivative:
    """The task loss of one sequence `ids` (1, T), in train or eval mode and from a fixed seed, in float64."""

    def __init__(self, tested: ModelUnderTest, build: Callable[[], BaseModel], ids: Tensor, train: bool) -> None:
        self.tested, self.build, self.ids, self.train = tested, build, ids, train
        self.model = in_float64(build, ids).train(train)
        self.params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with Float64():
            loss = self._loss(self.model)
            self.gradient = _gradient(loss, self.params)
        self.base = loss.item()
        self.where = f"{'train' if train else 'eval'} mode, {ids.shape[1]} tokens"

    def _loss(self, model: BaseModel, seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        return self.tested.task_loss(*call(model, self.ids, targets=next_tokens(self.ids))[1:])

    def require_fp32_agrees(self) -> None:
        """Raise `CheckFailed` unless backward gives the same in fp32; with dropout the two draw different noise."""
        model = self.build().train(self.train)
        with torch.no_grad():
            if not torch.equal(self._loss(model, seed=0), self._loss(model, seed=1)):
                return
        loss = self._loss(model)
        if abs(loss.item() - self.base) > 1e-5 * max(1.0, abs(self.base)):
            return  # a rounded tie, such as another expert
        narrow = _gradient(loss, {n: p for n, p in model.named_parameters() if p.requires_grad})
        largest = max(g.norm().item() for g in self.gradient.values())
        for name, wide in reversed(self.gradient.items()):  # the last one is nearest to the cause
            error, size = (narrow[name] - wide).norm().item(), wide.norm().item()
            require(
                error < 0.05 * size + 1e-5 * largest,
                f"{name}: backward gives a gradient of norm {narrow[name].norm():.4g} in fp32, {size:.4g} in float64; "
                f"they differ by {error:.3g} ({self.where})",
            )

    def require_agrees(self, names: Sequence[str], trials: int) -> None:
        """Raise `CheckFailed` where steps along all of `names` at once change the loss by other than the gradient."""
        found = self._mismatch(names, trials)
        while found and len(names) > 1:  # half of them disagree as well; the last one is nearest to the cause
            half = names[len(names) // 2 :]
            in_half = self._mismatch(half, trials)
            names = half if in_half else names[: len(names) // 2]
            found = in_half or self._mismatch(names, trials) or found
        if found:
            expected, change = found
            require(
                False,
                f"{names[0]}: backward gives {expected:.4g} for a step that changes the loss by {change:.4g} "
                f"({self.where})",
            )

    @torch.no_grad()
    def _mismatch(self, names: Sequence[str], trials: int) -> tuple[float, float] | None:
        """Return (what the gradient expects, change of the loss) of a step where they differ, else None."""
        for trial in range(trials):
            generator = torch.Generator().manual_seed(trial)
            steps = {name: self._step(name, generator) for name in names}
            expected = [(self.gradient[name] * step).sum().item() for name, step in steps.items()]
            total, allowed = sum(expected), TOLERANCE * max(map(abs, expected))
            before, size = None, 1.0
            for _ in range(5):
                change = self._change(steps, size) / size
                rounding = ROUNDING * max(1.0, abs(self.base)) / size
                if abs(change - total) <= allowed + rounding:
                    break
                if before is not None and abs(change - before) <= 0.05 * abs(change) + rounding:
                    return total, change
                before, size = change, size / SHRINKS
        return None

    def _step(self, name: str, generator: torch.Generator) -> Tensor:
        """Return a step along the gradient and a random direction that changes the loss by about `CHANGE`."""
        param, gradient = self.params[name], self.gradient[name]
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        direction, length = noise / noise.norm(), REACH * max(param.norm().item(), 0.05 * param.numel() ** 0.5)
        size = gradient.norm().item()
        if size > 0:
            direction, length = direction + gradient / size, min(length, CHANGE / size)
        return length * direction

    def _change(self, steps: dict[str, Tensor], size: float) -> float:
        """Return half the difference of the losses after `steps` to both sides."""
        here, values = {name: self.params[name].clone() for name in steps}, []
        for sign in (size, -size):
            for name, step in steps.items():
                self.params[name].copy_(here[name] + sign * step)
            with Float64():
                values.append(self._loss(self.model).item())
        for name, value in here.items():
            self.params[name].copy_(value)
        return (values[0] - values[1]) / 2


def _gradient(loss: Tensor, params: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), grads)}
