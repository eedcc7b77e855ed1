"""Where `moe/load` (L, E) is reported: are loads counted right, does the router learn, are the loads balanced?"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from checks.harness import ModelUnderTest, NotApplicable, call, logits_of, next_tokens, require, require_close
from checks.harness.tiny_args import ACTIVE_EXPERTS, EXPERTS
from model.basemodel import BaseModel, is_expert_load

Gradients = Callable[[], list[Tensor | None]]  # of the weights of one expert
KEY = "moe/load"


def _load(model: BaseModel, ids: Tensor) -> Tensor:
    other_vars = call(model, ids, targets=next_tokens(ids))[2]
    if KEY not in other_vars:
        raise NotApplicable(f"other_vars has no {KEY!r}")
    load = other_vars[KEY].detach().float()
    require(load.ndim == 2, f"{KEY} has shape {tuple(load.shape)}, expected (layers, experts)")
    return load


def loads_are_counted(tested: ModelUnderTest) -> None:
    """The loads of a layer sum to tokens times active experts, each sequence adds its own, and none is negative.

    Measured: the loads of a batch and of each of its sequences; the sum against `n_activated_experts`, or, where the
    arguments have no such name, an integer number of experts per token.
    Causes: loads that are shares instead of counts; tokens counted once for all their experts; loads of one layer
    reported for all; counts summed over calls; experts with a capacity that drop tokens.
    """
    model, ids = tested.build().train(), tested.tokens()
    with torch.no_grad():
        load = _load(model, ids)
        added = sum((_load(model, ids[i : i + 1]) for i in range(len(ids))), torch.zeros_like(load))
    active = next((getattr(tested.args, n) for n in ACTIVE_EXPERTS if hasattr(tested.args, n)), None)
    sums, tokens = load.sum(dim=1), ids.numel()
    if active is None:
        active = max(1, round(sums[0].item() / tokens))
    seen = ", ".join(f"{s:.5g}" for s in sums.tolist())
    require(
        ((sums - tokens * active).abs() < 1e-3).all(),
        f"the loads of the layers sum to {seen}; {tokens} tokens with {active} experts each make {tokens * active}",
    )
    require((load >= 0).all() and torch.equal(load, load.round()), "loads are counts: integers, none negative")
    require_close(added, load, "loads of the sequences added up against the loads of the batch", 1e-4)


@torch.no_grad()
def loads_leave_padding_out(tested: ModelUnderTest) -> None:
    """Padding, whose doc_ids are -1, adds nothing to any load: a routing bias would follow it.

    Measured: two documents in a sequence with padding after them and a sequence of padding alone: the loads against
    those of the documents without padding, and the same for more padding, and for other tokens in its place.
    Causes: doc_ids that do not reach the experts; padding known by its token or by its targets; document 0 taken for
    padding, or the mask of one sequence used for all.
    """
    tested.needs("doc_ids")
    model, ids = tested.build().train(), tested.tokens(batch_size=2)
    end, total = max(2, ids.shape[1] // 2), ids.shape[1]
    doc_ids = torch.zeros_like(ids)
    doc_ids[:, end // 2 :] = 1
    doc_ids[0, end:], doc_ids[1] = -1, -1

    def loads(ids: Tensor, doc_ids: Tensor | None) -> dict[str, Tensor]:
        targets = next_tokens(ids) if doc_ids is None else next_tokens(ids).masked_fill(doc_ids < 0, -100)
        other_vars = call(model, ids, targets=targets, doc_ids=doc_ids)[2]
        if KEY not in other_vars:
            raise NotApplicable(f"other_vars has no {KEY!r}")
        return {key: value.float() for key, value in other_vars.items() if is_expert_load(key, value)}

    padded = loads(ids, doc_ids)
    alone = loads(ids[:1, : end // 2], None)[KEY] + loads(ids[:1, end // 2 : end], None)[KEY]
    require_close(padded[KEY], alone, f"{KEY} of {end} tokens with {2 * total - end} of padding, against without", 1e-4)
    other = ids.masked_scatter(doc_ids < 0, tested.tokens(batch_size=2, seed=9))
    less = slice(0, max(end + 1, total - 3))  # and not less than one token of padding
    require_close(loads(other, doc_ids)[KEY], padded[KEY], f"{KEY} with other tokens in place of padding", 1e-4)
    for key, load in loads(ids[:, less], doc_ids[:, less]).items():
        require_close(padded[key], load, f"{key} with more padding, against less", 1e-4)


def loads_are_true(tested: ModelUnderTest) -> None:
    """An expert with load has a gradient, an expert without load has none.

    Measured: sequences of one, two and three tokens, so that some experts stay idle, with random routing biases; the
    gradient of each expert's weights (stacked along dim 0, or a ModuleList of experts) against its load.
    Causes: loads counted before the choice is final (without the bias, before the groups are limited); loads in another
    order than the experts; all experts computed and multiplied by zero.
    """
    model = tested.build().train()
    experts = _expert_weights(model, _load(model, tested.tokens()))
    _shuffle_biases(model, tested.tokens())
    for length in (1, 2, 3):
        ids = tested.tokens(batch_size=1, length=length, seed=40 + length)
        model.zero_grad()
        _, loss, other_vars = call(model, ids, targets=next_tokens(ids))
        tested.task_loss(loss, other_vars).backward()
        for layer, (name, slices) in enumerate(experts):
            reached = [any(g is not None and bool((g != 0).any()) for g in weights()) for weights in slices]
            busy = (other_vars[KEY][layer] > 0).tolist()
            for expert, (has, loaded) in enumerate(zip(reached, busy)):
                require(
                    has == loaded,
                    f"{KEY}[{layer}, {expert}] is {other_vars[KEY][layer][expert]:.0f} for {length} "
                    f"tokens, and {name} has {'a' if has else 'no'} gradient for this expert",
                )


@torch.no_grad()
def _shuffle_biases(model: BaseModel, ids: Tensor) -> None:
    """Give the buffers that `after_step` moves random values: with a bias of zero, forgetting it goes unseen."""
    before = {k: v.clone() for k, v in model.named_buffers()}
    model.after_step({k: v.detach() for k, v in call(model, ids, targets=next_tokens(ids))[2].items()})
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and not torch.equal(buffer, before[name]):
            buffer.copy_(before[name] + 0.3 * torch.randn_like(buffer))


def _expert_weights(model: BaseModel, load: Tensor) -> list[tuple[str, list[Gradients]]]:
    """Return, for the first L MoE layers in order, (name, for each expert a function that gives its gradients)."""
    n_layers, n_experts = load.shape
    found: list[tuple[str, list[Gradients]]] = []
    for name, module in model.named_modules():
        stacked = [p for p in module.parameters(recurse=False) if p.ndim >= 3 and p.shape[0] == n_experts]
        lists = [
            c
            for c in module.children()
            if isinstance(c, nn.ModuleList) and len(c) == n_experts and c is not getattr(model, "layers", None)
        ]
        if stacked:
            found.append((name, [partial(_slices, stacked, expert) for expert in range(n_experts)]))
        elif lists:
            found.append((name, [partial(_gradients, expert) for expert in lists[0]]))
    if len(found) < n_layers:
        raise NotApplicable("the experts' weights are neither stacked along dim 0 nor a ModuleList")
    return found[:n_layers]


def _slices(stacked: list[nn.Parameter], expert: int) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad[expert] for p in stacked]


def _gradients(expert: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in expert.parameters()]


def routers_have_a_task_gradient(tested: ModelUnderTest) -> None:
    """The task loss, not only a balance loss, teaches the router.

    Measured: the gradient of the task loss at each weight matrix with one row or column per expert: its root mean
    square against the median over all matrices; at least a ten-thousandth.
    Causes: weights that are detached, or taken after argmax or topk of something detached; one active expert whose
    weight is divided by itself and always 1; experts mixed without their weights.
    """
    tested.needs_repeatable_backward()
    model, ids = tested.build().train(), tested.tokens(batch_size=8)
    _, loss, other_vars = call(model, ids, targets=next_tokens(ids))
    named_so = (getattr(tested.args, name) for name in EXPERTS if hasattr(tested.args, name))
    n_experts = other_vars[KEY].shape[-1] if KEY in other_vars else next(named_so, 0)
    if not n_experts:
        raise NotApplicable(f"other_vars has no {KEY!r}")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.ndim >= 2]
    grads = torch.autograd.grad(tested.task_loss(loss, other_vars), [p for _, p in named], allow_unused=True)
    rms = {n: 0.0 if g is None else g.square().mean().sqrt().item() for (n, _), g in zip(named, grads)}
    typical = sorted(rms.values())[len(rms) // 2]
    routers = [n for n, p in named if p.ndim == 2 and n_experts in p.shape]
    routers = [n for n in routers if any(w in n for w in ("rout", "gat", "expert", "centroid", "switch"))] or routers
    if not routers:
        raise NotApplicable("no weight matrix with one row per expert")
    weak = [n for n in routers if not _training_only(model, n) and rms[n] < 1e-4 * typical]
    require(
        not weak,
        f"the task loss has no gradient to {', '.join(weak)} (root mean square "
        f"{', '.join(f'{rms[n]:.2g}' for n in weak)}, typical {typical:.2g})",
    )


def _training_only(model: BaseModel, name: str) -> bool:
    """Modules outside `layers` may serve another loss than the task's."""
    return hasattr(model, "layers") and not name.startswith("layers.")


@torch.no_grad()
def bias_update_evens_the_load(tested: ModelUnderTest) -> None:
    """Steps of `after_step` bring the experts' loads nearer to each other.

    Measured: the same batch with fixed weights, `after_step` with its loads again and again; the mean spread (standard
    deviation over experts, by the mean load) of the last ten rounds against the first.
    Causes: the wrong sign; the bias added to the weights instead of the choice, or to nothing; loads of another layer.
    """
    model, ids = _fast_bias(tested).train(), tested.tokens(batch_size=8)
    before = {k: v.clone() for k, v in model.named_buffers()}
    spreads = []
    for _ in range(120):
        other_vars = call(model, ids, targets=next_tokens(ids))[2]
        if KEY not in other_vars:
            raise NotApplicable(f"other_vars has no {KEY!r}")
        load = other_vars[KEY].float()
        spreads.append((load.std(dim=1) / load.mean(dim=1)).mean().item())
        model.after_step({k: v.detach() for k, v in other_vars.items()})
        if len(spreads) == 1 and all(torch.equal(v, before[k]) for k, v in model.named_buffers()):
            raise NotApplicable("after_step moves no buffer")
    last = sum(spreads[-10:]) / 10
    require(
        last < 0.9 * spreads[0] or spreads[0] < 0.05,
        f"the relative spread of the loads was {spreads[0]:.3f} and is {last:.3f} after 120 bias updates",
    )


def _fast_bias(tested: ModelUnderTest) -> BaseModel:
    """Return a model whose bias moves fast enough to see it."""
    speed = getattr(tested.args, "bias_update_speed", 0)
    if speed:
        return tested.build(bias_update_speed=max(0.005, speed))
    return tested.build()


@torch.no_grad()
def bias_only_chooses(tested: ModelUnderTest) -> None:
    """The routing bias decides which experts are chosen and does not weigh the experts' outputs.

    Measured: the same value added to all entries of each buffer that `after_step` moves: the choice, and so the
    logits, must stay.
    Causes: weights gathered from score + bias instead of the score.
    """
    model, ids = tested.build(), tested.tokens()
    want, before = logits_of(model, ids), {k: v.clone() for k, v in model.named_buffers()}
    load = _load(model, ids)
    model.after_step({k: v.detach() for k, v in call(model, ids, targets=next_tokens(ids))[2].items()})
    moved = [
        (k, v)
        for k, v in model.named_buffers()
        if v.is_floating_point() and not torch.equal(v, before[k]) and v.shape[-1:] == load.shape[-1:]
    ]
    if not moved:
        raise NotApplicable("after_step moves no buffer with one entry per expert")
    for name, buffer in moved:
        buffer.copy_(before[name] + 0.25)
    require_close(logits_of(model, ids), want, f"logits with 0.25 more on all of {', '.join(n for n, _ in moved[:3])}")


def balance_loss_evens_the_load(tested: ModelUnderTest) -> None:
    """Following the balance loss does not make the loads more uneven.

    Measured: forty steps of AdamW on the routers with the terms named balance, aux or load alone; the spread of the
    loads before and after.
    Causes: the wrong sign; a product of the wrong two factors; counts used where only the probabilities carry a graph.
    """
    model, ids = tested.build().train(), tested.tokens(batch_size=8)
    n_experts = _load(model, ids).shape[1]
    routers = [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and n_experts in p.shape]

    def look() -> tuple[Tensor | None, float]:
        other_vars = call(model, ids, targets=next_tokens(ids))[2]
        names = [k for k in other_vars if k.startswith("loss/") and any(w in k for w in ("balance", "aux", "load"))]
        terms = [other_vars[k] for k in names]
        load = other_vars[KEY].float()
        return sum(terms) if terms else None, (load.std(dim=1) / load.mean(dim=1)).mean().item()

    term, before = look()
    if term is None or not routers or not term.requires_grad:
        raise NotApplicable("no term named balance, aux or load with a graph")
    optimizer = torch.optim.AdamW(routers, lr=1e-2, weight_decay=0.0)
    after = before
    for _ in range(40):
        term, after = look()
        assert term is not None
        for param, grad in zip(routers, torch.autograd.grad(term, routers, allow_unused=True)):
            param.grad = grad
        optimizer.step()
    require(
        after < 1.1 * before + 0.05,
        f"the relative spread of the loads was {before:.3f} and is {after:.3f} after forty steps on the balance loss",
    )


def experts_differ(tested: ModelUnderTest) -> None:
    """The experts of a layer do not start as copies of each other: equal experts get equal gradients.

    Measured: the initial weights of the experts, in pairs.
    Causes: one expert copied by `expand`, `repeat` or `[expert] * n`; the same seed for each.
    """
    model = tested.build(unit_gain=False)
    with torch.no_grad():
        n_experts = _load(model, tested.tokens()).shape[1]
    for name, module in model.named_modules():
        stacked = [p for p in module.parameters(recurse=False) if p.ndim >= 3 and p.shape[0] == n_experts]
        lists = [
            c
            for c in module.children()
            if isinstance(c, nn.ModuleList) and len(c) == n_experts and c is not getattr(model, "layers", None)
        ]
        for param in stacked:
            same = param.std() > 0 and torch.equal(param[0].expand_as(param), param)
            require(not same, f"all experts in {name} start with the same weights")
        for experts in lists:
            first, *others = [torch.cat([p.flatten() for p in e.parameters()]) for e in experts]
            same = all(torch.equal(first, o) for o in others)
            require(not same, f"all experts in {name} start with the same weights")
