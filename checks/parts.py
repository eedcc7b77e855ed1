"""Do parts that have one of the usual names do what the name says? The names are listed in model/basemodel.py."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from checks.harness import ModelUnderTest, NotApplicable, call, logits_of, next_tokens, require
from model.basemodel import BaseModel

WINDOWS = ("window_size", "sliding_window")
SINKS = ("sink", "sinks")
TAKES_ALL = 1e4  # the score of a sink beside which all others vanish


@torch.no_grad()
def windows_count_the_token_itself(tested: ModelUnderTest) -> None:
    """A window of W tokens lets a token see W tokens, itself counted: no more and no fewer.

    Measured: the logits against those of a model with the same weights and a larger window: equal for the first W
    tokens, and at the next one, which does not see token 0, different for the first time.
    Causes: `age <= window` for `age < window`; `window - 1` for the tokens before the query, and `<` once more.
    """
    name = next((n for n in WINDOWS if getattr(tested.args, n, None)), None)
    if name is None:
        raise NotApplicable("the arguments have no window_size")
    try:
        size, length = int(getattr(tested.args, name)), tested.args.max_seq_len
        if size >= length:
            size = max(1, length // 3)
        sizes: list[dict[str, Any]] = [{name: size}, {name: length}]
        model, wider = (tested.build(**changes) for changes in sizes)
        wider.load_state_dict(model.state_dict())
    except Exception as error:
        raise NotApplicable(f"no two models that differ in {name} alone: {error}") from error
    ids = tested.tokens()
    want = logits_of(wider, ids)
    difference = (logits_of(model, ids) - want).abs().amax(dim=(0, 2)) / want.abs().max().clamp(min=1.0)  # (T,)
    differ = (difference > 2e-5).nonzero()[:, 0].tolist()
    if not differ:
        raise NotApplicable(f"{name} changes nothing")
    seen = f"{name}={size}: logits differ from those of a larger window at position {differ[0]} for the first time"
    require(differ[0] == size, f"{seen}: a token sees {differ[0]} tokens, itself counted, and not {size}")


@torch.no_grad()
def sinks_only_take(tested: ModelUnderTest) -> None:
    """A sink is a score per head in the denominator of a softmax only: it takes attention, and gives nothing.

    Measured: the input of `o_proj` in each module with a parameter `sink` or `sinks`, when these are so large that they
    take all: it is zero; and when one of them is: then heads are left that are not zero.
    Causes: a sink added to every score, where the softmax cancels it; the column of the sink not dropped, or another
    one dropped; what the sink takes given to the token itself or to the mean of the values; one sink for all heads.
    """
    model, ids = tested.build(), tested.tokens()
    found = [(n, m, s) for n, m in model.named_modules() for s in SINKS if isinstance(_parameter(m, s), nn.Parameter)]
    if not found:
        raise NotApplicable("no module has a parameter sink or sinks")
    for where, module, name in found:
        sink = getattr(module, name)
        n_heads = getattr(tested.args, "n_heads", sink.numel())
        _input_of_o_proj(model, module, ids, where)  # does not apply without one
        shape = tuple(sink.shape)
        require(sink.numel() == n_heads, f"{where}.{name} has shape {shape}, expected a number per head, ({n_heads},)")
        before = sink.clone()
        sink.fill_(TAKES_ALL)
        out, usual = _input_of_o_proj(model, module, ids, where), 1.0
        sink.copy_(before)
        sink[0] = TAKES_ALL
        if n_heads > 1:
            usual = _input_of_o_proj(model, module, ids, where).abs().max().item()
        sink.copy_(before)
        size = out.abs().max().item()
        require(
            size <= 1e-4 * max(1.0, usual),
            f"{where}.{name} = {TAKES_ALL:g} takes all attention, and the input of o_proj is still up to {size:.3g}",
        )
        require(usual > 1e-6, f"{where}.{name}[0] = {TAKES_ALL:g} takes the attention of all heads, not that of head 0")


def _parameter(module: nn.Module, name: str) -> object:
    return dict(module.named_parameters(recurse=False)).get(name)


def _input_of_o_proj(model: BaseModel, module: nn.Module, ids: Tensor, where: str) -> Tensor:
    project = getattr(module, "o_proj", None)
    if not isinstance(project, nn.Module):
        raise NotApplicable(f"{where} has no o_proj")
    with _inputs(project) as seen:
        logits_of(model, ids)
    if not seen:
        raise NotApplicable(f"{where}.o_proj is not called as a module")
    return seen[0]


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, collect the first argument of each call of `module`."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def index_loss_teaches_the_indexer_alone(tested: ModelUnderTest) -> None:
    """An index loss and all other terms of the loss teach different parameters.

    Measured: the gradients of the terms that have "index" in their names, or alone teach a parameter that has it, and
    those of all other terms together: no parameter has both, and each term has some.
    Causes: a target, the attention of the model, that is not detached: the trunk learns to please its indexer; an input
    of the indexer that is not detached; scores of the indexer that reach the attention.
    """
    model, ids = tested.build().train(), tested.tokens(batch_size=4)
    other_vars = call(model, ids, targets=next_tokens(ids))[2]
    terms = {key: value for key, value in other_vars.items() if key.startswith("loss/") and value.requires_grad}
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    taught = {}
    for key, value in terms.items():
        grads = torch.autograd.grad(value, list(params.values()), retain_graph=True, allow_unused=True)
        taught[key] = {name for name, grad in zip(params, grads) if grad is not None and bool(grad.any())}

    def by_others(keys: set[str]) -> set[str]:
        return {name for key in taught.keys() - keys for name in taught[key]}

    index = {key for key in terms if "index" in key}
    index |= {key for key in terms if any("index" in name for name in taught[key] - by_others({key}))} - {"loss/ce"}
    if not index:
        raise NotApplicable("no term of the loss has index in its name")
    for key in sorted(index):
        require(taught[key], f"{key} has no gradient to any parameter")
        both = sorted(taught[key] & by_others(index))
        more = f" and {len(both) - 4} more" if len(both) > 4 else ""
        require(not both, f"{key} and the other terms of the loss both teach {', '.join(both[:4])}{more}")


@torch.no_grad()
def sinkhorn_mixes_streams_evenly(tested: ModelUnderTest) -> None:
    """Matrices of Sinkhorn-Knopp that mix residual streams are doubly stochastic: rows and columns sum to 1.

    Measured: where an argument `hc_iters`, or one with "sinkhorn" in its name, counts iterations and the layers have
    streams (B, T, n, D): with many iterations, random vectors, and nothing written by `o_proj` and `down_proj`, each
    layer keeps the sum of the streams, and streams that are equal stay equal.
    Causes: rows normalised twice and columns never; an axis of the tokens or the batch; iterations on a copy.
    """
    names = [f.name for f in dataclasses.fields(tested.args)]
    name = next((n for n in names if n == "hc_iters" or "sinkhorn" in n and n.endswith("iters")), None)
    if name is None:
        raise NotApplicable("the arguments have no hc_iters")
    changes: dict[str, Any] = {name: max(400, getattr(tested.args, name))}
    model, ids = tested.build(**changes), tested.tokens(batch_size=2)
    for key, param in model.named_parameters():
        if any(word in key.split(".") for word in ("o_proj", "down_proj")):
            param.zero_()
        elif param.ndim < 2:
            param.add_(torch.randn_like(param), alpha=1.5)
    n_streams = 0
    for layer, module in enumerate(getattr(model, "layers", ())):
        for equal in (False, True):
            x, out = _streams(model, module, ids, equal)
            if x is None or out is None:
                continue
            n_streams = x.shape[2]
            what = "equal streams do not stay equal" if equal else "the sum of the streams changes"
            error = (out - x if equal else out.sum(dim=2) - x.sum(dim=2)).abs().max() / x.abs().max()
            require(
                error < 1e-2, f"layer {layer} that writes nothing: {what}, by {error.item():.2g} of the largest value"
            )
    if not n_streams:
        raise NotApplicable("no layer has streams (B, T, n, D)")


def _streams(model: BaseModel, module: nn.Module, ids: Tensor, equal: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return what one layer gets and returns; on the way its streams are made equal or unlike. None if it has none."""
    seen: list[Tensor] = []

    def before(module: nn.Module, args: tuple) -> tuple:
        x = args[0]
        if x.ndim == 4 and equal:
            x = x.mean(dim=2, keepdim=True).expand_as(x)
        elif x.ndim == 4:
            x = x * torch.linspace(-1, 2, x.shape[2])[:, None]
        seen.append(x)
        return (x, *args[1:])

    def after(module: nn.Module, args: tuple, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    handles = module.register_forward_pre_hook(before), module.register_forward_hook(after)
    try:
        logits_of(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    x, out = seen[:2] if len(seen) > 1 else (ids, ids)
    return (x, out) if x.ndim == 4 and out.shape == x.shape else (None, None)
