"""What a check works on: an architecture so small that it runs in milliseconds, with weights that show mistakes."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks.harness.tiny_args import tiny_args
from model import get_model_and_args
from model.basemodel import BaseModel, BaseModelArgs

REPEATS = 1e-5  # the relative difference that two backward passes may have
LONG = 300  # tokens of a sequence that reaches beyond the usual chunks, and beyond the integers that bf16 can hold


class CheckFailed(AssertionError):
    """The architecture is wrong: the message has what was seen, with values. `causes`: the likely ones, if known."""

    def __init__(self, message: str, causes: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.causes = list(causes)


class NotApplicable(Exception):
    """The architecture does not declare what this check is about."""


def require(condition: object, message: str, causes: Iterable[str] = ()) -> None:
    """Raise `CheckFailed(message)` unless `condition` holds."""
    if not condition:
        raise CheckFailed(message, causes)


def require_close(got: Tensor, want: Tensor, what: str, tolerance: float = 2e-4) -> None:
    """Raise `CheckFailed` when two tensors differ by more than `tolerance`, relative to the larger scale of `want`."""
    require(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if not got.numel():
        return
    require(got.isfinite().all(), f"{what}: {(~got.isfinite()).sum()} of {got.numel()} elements are non-finite")
    error, bound = (got - want).abs(), tolerance * max(1.0, want.abs().max().item())
    worst = tuple(i.item() for i in torch.unravel_index(error.argmax(), error.shape))
    where = f" at {list(worst[:2])} of (sequence, position)" if got.ndim == 3 else ""
    require(error.max() <= bound, f"{what}: differs by {error.max():.3g}{where} (allowed {bound:.2g})")


def positions_text(positions: Iterable) -> str:
    """Return positions as short text: `3, 4, 5 and 9 more`."""
    positions = [int(p) for p in positions]
    more = f" and {len(positions) - 6} more" if len(positions) > 6 else ""
    return ", ".join(map(str, positions[:6])) + more


def call(model: BaseModel, ids: Tensor, **inputs: Any) -> tuple:
    """Return what `forward` returns, after checking its form."""
    out = model(ids, **inputs)
    form = "(logits, loss, other_vars)"
    require(isinstance(out, tuple), f"forward returns {type(out).__name__}, expected a tuple {form}")
    require(len(out) == 3, f"forward returns {len(out)} values, expected three: {form}")
    require(isinstance(out[2], dict), f"other_vars is {type(out[2]).__name__}, expected a dict of tensors")
    return out


def logits_of(model: BaseModel, ids: Tensor, **inputs: Any) -> Tensor:
    """Return the logits (B, T, V) of a call without targets."""
    logits = call(model, ids, **inputs)[0]
    require(
        isinstance(logits, Tensor),
        f"without targets forward must return logits, and they are {type(logits).__name__}",
    )
    shape = (*ids.shape, model.args.vocab_size)
    require(tuple(logits.shape) == shape, f"logits have shape {tuple(logits.shape)}, expected (B, T, V) = {shape}")
    return logits


def next_tokens(ids: Tensor) -> Tensor:
    """Return targets for random tokens `ids` (B, T): every sequence moved by one."""
    return ids.roll(-1, 1)


class Embedded(NamedTuple):
    """A call of the token embedding: the ids (B, N) that it was given, and what it returned (B, N, D)."""

    ids: Tensor
    out: Tensor


@contextmanager
def embedded_tokens(model: BaseModel) -> Iterator[list[Embedded]]:
    """Within the block, collect what the model's token embedding returns: tensors to take gradients at."""
    table = next(
        (m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings >= model.args.vocab_size), None
    )
    if table is None:
        raise NotApplicable("there is no nn.Embedding of the vocabulary to take gradients at")
    outputs: list[Embedded] = []

    def collect(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        outputs.append(Embedded(args[0], out.requires_grad_()))
        return out

    handle = table.register_forward_hook(collect)
    try:
        yield outputs
    finally:
        handle.remove()


def gradient_at_tokens(scalar: Tensor, outputs: list[Embedded]) -> Tensor:
    """Return the size (B, T) of the gradient of `scalar` at the embedded tokens.

    A second look-up, such as that of the next tokens for a multi-token head, counts at the positions of its tokens.
    """
    ids = max((e.ids for e in outputs), key=torch.Tensor.numel)  # the first of the longest
    sizes = torch.zeros(ids.shape)
    if not scalar.requires_grad:
        return sizes
    grads = torch.autograd.grad(scalar, [e.out for e in outputs], retain_graph=True, allow_unused=True)
    for embedded, grad in zip(outputs, grads):
        if grad is not None and embedded.ids.ndim == 2:
            at = torch.arange(embedded.ids.shape[1]) + _offset(embedded.ids, ids)
            size = grad.abs().amax(dim=-1)
            if embedded.ids.shape == ids.shape and torch.equal(embedded.ids, ids[:, at % ids.shape[1]]):
                at = at % ids.shape[1]  # rolled around
            inside = (at >= 0) & (at < ids.shape[1])
            sizes.index_add_(1, at[inside], size[:, inside].to(sizes.dtype))
    return sizes


def _offset(some: Tensor, ids: Tensor) -> int:
    """Return how many positions the tokens `some` (B, N) stand behind their own in `ids` (B, T), 0 where they do not.

    So for `some` = ids[:, 1:] it is 1, for ids moved to the right it is -1. Each row of `some` is one of the first B.
    """
    length, n = ids.shape[1], some.shape[1]
    if len(some) != len(ids):
        return 0

    def equal(offset: int) -> float:
        start, end = max(0, -offset), min(n, length - offset)
        if end <= start:
            return 0.0
        return (some[:, start:end] == ids[:, start + offset : end + offset]).float().mean().item() * (end - start)

    best = max(sorted(range(1 - n, length), key=abs), key=equal)
    return best if equal(best) >= 0.5 * n else 0


class ModelUnderTest:
    """One architecture under check: `Model`, its tiny `args`, and ways to make models and inputs from fixed seeds.

    name: of a registered model. switches: argument values that the tiny args take over from a real run.
    `ModelUnderTest.of(Model, ModelArgs)` takes the classes themselves.
    """

    def __init__(self, name: str, switches: dict | None = None) -> None:
        Model, ModelArgs = get_model_and_args(name)
        self._set(Model, ModelArgs, name, switches)

    @classmethod
    def of(cls, Model: type[BaseModel], ModelArgs: type, switches: dict | None = None) -> "ModelUnderTest":
        tested = cls.__new__(cls)
        tested._set(Model, ModelArgs, Model.model_name or Model.__name__, switches)
        return tested

    def _set(self, Model: type[BaseModel], ModelArgs: type, name: str, switches: dict | None) -> None:
        self.Model = Model
        self.ModelArgs = ModelArgs
        self.name = name
        self.args, self.warning = tiny_args(Model, ModelArgs, switches)

    def build(self, seed: int = 0, unit_gain: bool = True, **changes: Any) -> BaseModel:
        """Return a model in eval mode; `changes` are arguments other than the tiny ones. `unit_gain`: weights of unit
        gain instead of the small initial ones, whose outputs hardly depend on the input, so that a leak or a drift
        would hide in rounding."""
        gain = self._gain if unit_gain else 0.0  # before the seed is set: finding it draws random numbers
        torch.manual_seed(seed)
        model = self.Model(self.changed_args(**changes)).eval()
        if gain:
            _set_gain(model, gain)
        return model

    def changed_args(self, **changes: Any) -> BaseModelArgs:
        """Return the tiny args with some values changed."""
        if not changes:
            return copy.deepcopy(self.args)
        given = {f.name: getattr(self.args, f.name) for f in dataclasses.fields(self.args) if f.init}
        return type(self.args)(**{**given, **changes})

    def build_long(self, seed: int = 0, unit_gain: bool = True) -> BaseModel:
        """Return a model for sequences of `LONG` tokens."""
        try:
            return self.build(seed, unit_gain, max_seq_len=LONG)
        except Exception as error:
            raise NotApplicable(f"no model of max_seq_len={LONG} with the other arguments small: {error}") from error

    @cached_property
    def _gain(self) -> float:
        """The largest gain at which the outputs stay finite: an unusual recurrence may blow up at 1."""
        ids = self.tokens()
        for gain in (1.0, 0.3):
            torch.manual_seed(0)
            model = self.Model(self.changed_args()).eval()
            _set_gain(model, gain)
            with torch.no_grad():
                logits = model(ids)[0]
            if isinstance(logits, Tensor) and logits.isfinite().all() and logits.abs().max() < 1e4:
                return gain
        return 0.0

    def tokens(self, batch_size: int = 3, length: int | None = None, seed: int = 1) -> Tensor:
        """Return random token ids (batch_size, length or max_seq_len)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.args.vocab_size, (batch_size, length or self.args.max_seq_len), generator=generator)

    def needs(self, parameter: str) -> None:
        """Skip the check unless the model's forward accepts `parameter`."""
        if not self.Model.accepts(parameter):
            raise NotApplicable(f"forward does not accept {parameter}")

    def larger(self) -> "ModelUnderTest":
        """Return the same with ten times the vocabulary and `LONG` tokens: for what tiny sizes cannot reach."""
        other = copy.copy(self)
        for name in ("_gain", "_task_key", "backward_differences"):
            other.__dict__.pop(name, None)
        other.args = self.changed_args(vocab_size=10 * self.args.vocab_size, max_seq_len=LONG)
        return other

    @cached_property
    def backward_differences(self) -> dict[str, float]:
        """How far two backward passes differ: {which two: norm of the difference, relative to that of the gradient}."""
        ids, out = self.tokens(), {}
        for train in (False, True):
            model = self.build().train(train)
            mode = "train mode" if train else "eval mode"
            torch.manual_seed(0)
            loss = call(model, ids, targets=next_tokens(ids))[1]
            if not loss.requires_grad:  # contract.loss_exactly_with_targets fails
                continue
            first = _backward(model, loss)
            if self.Model.gradients_are_exact:  # a stochastic estimate may draw again
                out[f"{mode}, two backward passes of one forward pass"] = _difference(_backward(model, loss), first)
            torch.manual_seed(0)
            again = _backward(model, call(model, ids, targets=next_tokens(ids))[1])
            out[f"{mode}, two forward and backward passes with the same seed"] = _difference(again, first)
        return out

    @property
    def backward_repeats(self) -> bool:
        """Whether two backward passes give the same, so that gradients can be compared."""
        return all(difference < REPEATS for difference in self.backward_differences.values())

    def needs_repeatable_backward(self) -> None:
        """Skip a check that compares gradients where two backward passes differ."""
        if not self.backward_repeats:
            raise NotApplicable("two backward passes differ: see gradients.backward_is_deterministic")

    def task_loss(self, loss: Tensor, other_vars: dict[str, Tensor]) -> Tensor:
        """Return the cross-entropy among the terms of the loss: `loss/ce`, or the term that comes nearest to it."""
        return loss if self._task_key is None else other_vars.get(self._task_key, loss)

    @cached_property
    def _task_key(self) -> str | None:
        model, ids = self.build(), self.tokens()
        with torch.no_grad():
            _, loss, other_vars = call(model, ids, targets=next_tokens(ids))
            terms = {k: v for k, v in other_vars.items() if k.startswith("loss/")}
            if "loss/ce" in terms or not terms:
                return "loss/ce"
            want = negative_log_likelihood(logits_of(model, ids), next_tokens(ids)).mean()
        return min([None, *terms], key=lambda k: abs((loss if k is None else terms[k]).item() - want.item()))


def _backward(model: BaseModel, loss: Tensor) -> Tensor:
    """Return the gradient of all parameters as one vector; the graph is kept."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return torch.cat([grad.flatten().double() for grad in grads])


def _difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm().clamp(min=1e-30)).item()


def _set_gain(model: BaseModel, gain: float) -> None:
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad and param.ndim >= 2:
                param.normal_(std=gain * param.shape[-1] ** -0.5)
            elif param.requires_grad:
                param.add_(torch.randn_like(param), alpha=0.1)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target) in float64, one value per target that is not -100."""
    valid = targets != -100
    return -F.log_softmax(logits.double(), dim=-1)[valid].gather(1, targets[valid][:, None])[:, 0]
