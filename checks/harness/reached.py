"""Which elements of the weights a gradient reaches, and whether it is more than rounding."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from checks.harness.float64 import Float64, in_float64
from checks.harness.model_under_test import ModelUnderTest, NotApplicable, next_tokens, require
from checks.harness.training import train_steps
from model.basemodel import BaseModel

STEPS = 6  # after zero-initialised projections have left zero, the parameters behind them have a gradient too
FURTHER = (2,) * 6  # steps of each further round, while further slices are reached
ROUNDING = 1e-6  # of the gradient in fp32: what is left of it in float64 when it is rounding alone is 2e-9
FEW = 0.1  # of the slices may be unreached: units that happen to be off, a padding token


@dataclass
class Gradients:
    """The largest absolute values that the gradient of a parameter had in some steps, in fp32 and in float64."""

    fp32: Tensor
    float64: Tensor
    growing: bool = False  # the last steps have still reached more of it: nothing can be called dead

    def add(self, fp32: Tensor, float64: Tensor) -> None:
        self.fp32 = torch.maximum(self.fp32, fp32.detach().double().abs())
        self.float64 = torch.maximum(self.float64, float64.detach().double().abs())

    def vanishes(self) -> bool:
        """Whether nothing of it is left in float64."""
        return not self.growing and bool(self.float64.max() <= ROUNDING * self.fp32.max())

    def dead(self, dim: int) -> Tensor:
        """Return for each slice along `dim` whether nothing of it is left in float64."""
        others = [d for d in range(self.fp32.ndim) if d != dim]
        return self.float64.amax(others) <= ROUNDING * self.fp32.amax(others)

    def of(self, index: int) -> "Gradients":
        return Gradients(self.fp32[index], self.float64[index])


@dataclass(frozen=True)
class Slices:
    """Slices `indices` along `dim` of a weight, or of its slice `outer` along dim 0, that no gradient reaches."""

    dim: int
    outer: int | None
    indices: tuple[int, ...]
    total: int
    rounding: bool  # there was one in fp32

    def text(self, name: str, ndim: int) -> str:
        """Return them as an index: `name[3, :, 5]`."""
        shown = ", ".join(map(str, self.indices[:6])) + (", ..." if len(self.indices) > 6 else "")
        index = [":"] * ndim
        index[self.dim] = shown if len(self.indices) == 1 else f"[{shown}]"
        if self.outer is not None:
            index[0] = str(self.outer)
        while index[-1] == ":":
            index.pop()
        return f"{name}[{', '.join(index)}], {len(self.indices)} of {self.total} slices"

    def is_reached_by(self, larger: Tensor | None) -> bool:
        """Whether the gradient `larger` of the same weight, in a larger model, reaches clearly more of its slices."""
        if larger is None or self.rounding or larger.shape[self.dim] < self.total:
            return False
        if self.outer is not None:
            if self.outer >= len(larger):
                return False
            larger, dim = larger[self.outer], self.dim - 1
        else:
            dim = self.dim
        reached = larger.amax([d for d in range(larger.ndim) if d != dim]) > 0
        return (~reached).float().mean().item() < max(FEW, 0.7 * len(self.indices) / self.total)


def dead_slices(one: Gradients, other: Gradients | None) -> list[Slices]:
    """Return the slices of a weight that are dead in `one` and in `other`, where they are a tenth or more."""
    ndim = one.fp32.ndim
    found: list[Slices] = []
    if ndim < 2 or one.growing or other is not None and other.growing:
        return []
    for dim in range(ndim):
        found += _dead(one, other, dim)
    if ndim > 2:
        reached = ~(one.dead(0) & other.dead(0) if other is not None else one.dead(0))
        for outer in reached.nonzero()[:, 0].tolist():
            for dim in range(ndim - 1):
                found += _dead(one.of(outer), None if other is None else other.of(outer), dim, outer)
    return found


def _dead(one: Gradients, other: Gradients | None, dim: int, outer: int | None = None) -> Iterator[Slices]:
    dead = one.dead(dim) if other is None else one.dead(dim) & other.dead(dim)
    total, indices = len(dead), tuple(dead.nonzero()[:, 0].tolist())
    if total > 1 and indices and len(indices) >= FEW * total:
        fp32 = one.fp32 if other is None else torch.maximum(one.fp32, other.fp32)
        rounding = bool(fp32.index_select(dim, torch.tensor(indices)).any())
        yield Slices(dim if outer is None else dim + 1, outer, indices, total, rounding)


def gathered_gradients(tested: ModelUnderTest, unit_gain: bool) -> dict[str, Gradients | None]:
    """Return {parameter: its gradients over some steps of training}, None for a parameter without any.

    Steps go on while parts of a weight are unreached and each round reaches more of them.
    """
    model = tested.build(unit_gain=unit_gain).train()
    try:
        wide = in_float64(lambda: tested.build(unit_gain=unit_gain), tested.tokens()).train()
    except NotApplicable:
        wide = None
    seen: dict[str, Gradients | None] = {n: None for n, p in model.named_parameters() if p.requires_grad}
    before: dict[str, int] = {}
    first = 0
    for steps in (2 if unit_gain else STEPS, *FURTHER):
        _train(tested, model, wide, seen, range(first, first + steps))
        first += steps
        gathered = {name: pair for name, pair in seen.items() if pair is not None}
        now = {name: _count(pair) for name, pair in gathered.items()}
        if not any(now.values()) or now == before:
            return seen
        last, before = before, now
    for name, pair in gathered.items():
        pair.growing = now[name] < last[name]
    return seen


def _count(pair: Gradients) -> int:
    """Return how many slices are dead, the full weight counted too."""
    return pair.vanishes() + sum(len(slices.indices) for slices in dead_slices(pair, None))


def _train(
    tested: ModelUnderTest, model: BaseModel, wide: BaseModel | None, seen: dict[str, Gradients | None], steps: range
) -> None:
    """Take some steps of training, and gather the gradients until each slice is reached."""
    batches = [_every_token(tested, step) for step in steps]

    def look(step: int) -> None:
        narrow = {name: param.grad for name, param in model.named_parameters() if name in seen}
        for name, grad in narrow.items():
            if grad is not None:
                require(grad.isfinite().all(), f"the gradient of {name} is non-finite in step {steps[step] + 1}")
        if all(pair is not None and not _count(pair) for pair in seen.values()):
            return
        exact = narrow
        if wide is not None:
            wide.before_step(step, len(steps))
            exact = _in_float64(model, wide, batches[step])
        for name, grad in narrow.items():
            if grad is not None:
                pair = seen[name] = seen[name] or Gradients(torch.zeros(()), torch.zeros(()))
                precise = exact[name]
                pair.add(grad, torch.zeros_like(grad) if precise is None else precise)

    train_steps(model, batches, lr=3e-3, after_backward=look)


def _in_float64(model: BaseModel, wide: BaseModel, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor | None]:
    """Return the gradients of `wide` with the weights of `model`."""
    wide.load_state_dict(model.state_dict())
    wide.zero_grad()
    with Float64(without_epsilons=True):
        wide(batch[0], targets=batch[1])[1].backward()
    return {name: param.grad for name, param in wide.named_parameters()}


def _every_token(tested: ModelUnderTest, step: int) -> tuple[Tensor, Tensor]:
    """Return 16 sequences of random tokens that hold, as far as they go, each token of the vocabulary."""
    ids = tested.tokens(batch_size=16, seed=20 + step)
    every = torch.arange(tested.args.vocab_size)[: ids.numel()]
    ids.view(-1)[torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(step))[: len(every)]] = every
    return ids, next_tokens(ids)


def reached_in_a_larger_model(tested: ModelUnderTest) -> dict[str, Tensor]:
    """Return {parameter: the gradient of one step} with a larger vocabulary and longer sequences; {} where it fails."""
    try:
        larger = tested.larger()
        model = larger.build().train()
        ids, targets = _every_token(larger, step=0)
        model(ids, targets=targets)[1].backward()
    except Exception:
        return {}
    return {name: param.grad.abs() for name, param in model.named_parameters() if param.grad is not None}
