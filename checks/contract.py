"""Does `forward` fulfil the contract: shapes, other_vars, determinism, nothing stored about a call?"""

import random

import torch
from torch import Tensor

from checks.harness import ModelUnderTest, NotApplicable, call, logits_of, next_tokens, require, require_close
from checks.harness.snapshot import differences, restore_settings, settings, snapshot, switches
from model.basemodel import BaseModel


def shapes(tested: ModelUnderTest) -> None:
    """Logits are (B, T, V) floating point, for one token, for a few, and for exactly max_seq_len.

    Measured: forward on (B, T) = (1, 1), (2, 3), (1, T max) and (3, T max - 1) without targets.
    Causes: a `squeeze()` or `view` that drops a dimension of size one; a table that is one entry too short; a head over
    a padded vocabulary that is not cut to vocab_size; `logits[:, -1]` left over from generation.
    """
    model, longest = tested.build(), tested.args.max_seq_len
    for batch_size, length in ((1, 1), (2, min(3, longest)), (1, longest), (3, max(1, longest - 1))):
        logits = logits_of(model, tested.tokens(batch_size, length))
        require(logits.is_floating_point(), f"logits are {logits.dtype}")
        require(logits.isfinite().all(), f"logits of {batch_size} sequences of {length} tokens are not all finite")


def loss_exactly_with_targets(tested: ModelUnderTest) -> None:
    """There is a loss, a finite scalar with a graph, exactly when targets are given, in train and in eval mode.

    Measured: forward with and without targets in both modes.
    Causes: a loss that is only computed `if self.training`; a loss of shape (B, T) that was never reduced; a loss
    returned as a Python float; dummy targets invented when none are given.
    """
    ids = tested.tokens()
    for train in (True, False):
        model, mode = tested.build().train(train), "train" if train else "eval"
        require(call(model, ids)[1] is None, f"{mode} mode: a loss without targets, expected None")
        loss = call(model, ids, targets=next_tokens(ids))[1]
        require(isinstance(loss, Tensor), f"{mode} mode: with targets the loss is {loss!r}, expected a tensor")
        require(loss.ndim == 0, f"{mode} mode: the loss has shape {tuple(loss.shape)}, expected a scalar")
        require(loss.isfinite(), f"{mode} mode: the loss is {loss.item()}")
        require(loss.requires_grad, f"{mode} mode: the loss has no graph, so no parameter can learn")


def loss_is_sum_of_terms(tested: ModelUnderTest) -> None:
    """The loss is the sum of `loss/*`, which carry their graph; all else in other_vars is detached. It is a flat dict.

    Measured: the terms added up against the loss, `requires_grad` of each entry.
    Causes: an auxiliary loss that is reported but not added, or added but not reported; a term reported before its
    weight is applied; a `.detach()` missing on a statistic, which keeps the full graph alive; `.item()` on a value.
    """
    model, ids = tested.build().train(), tested.tokens()
    _, loss, other_vars = call(model, ids, targets=next_tokens(ids))
    for key, value in other_vars.items():
        require(isinstance(key, str), f"other_vars has the key {key!r}, expected a string")
        require(isinstance(value, Tensor), f"other_vars[{key!r}] is {type(value).__name__}, expected a tensor")
        require(value.ndim <= 2, f"other_vars[{key!r}] has shape {tuple(value.shape)}, expected at most two dimensions")
        term = key.startswith("loss/")
        require(not term or value.ndim == 0, f"other_vars[{key!r}] has shape {tuple(value.shape)}, expected a scalar")
        require(term or not value.requires_grad, f"other_vars[{key!r}] still carries its graph: detach it")
    terms = {k: v for k, v in other_vars.items() if k.startswith("loss/")}
    if terms:
        missing = [k for k, v in terms.items() if not v.requires_grad]
        require(not missing, f"{', '.join(missing)} has lost its graph: a term of the loss must not be detached")
        listed = " + ".join(f"{k} {v.item():.4g}" for k, v in terms.items())
        require_close(sum(terms.values()), loss, f"{listed} against the loss {loss.item():.4g}", 1e-5)
        if tested.backward_repeats:  # else gradients.backward_is_deterministic fails
            _gradients_add_up(model, loss, terms)


def _gradients_add_up(model: BaseModel, loss: Tensor, terms: dict[str, Tensor]) -> None:
    """The loss must teach what its terms teach: a term added by its value alone would go unnoticed."""
    params = [p for p in model.parameters() if p.requires_grad]

    def gradient(value: Tensor) -> Tensor:
        grads = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for p, g in zip(params, grads)])

    total, parts = gradient(loss), {key: gradient(value) for key, value in terms.items()}
    error, size = (total - sum(parts.values())).norm(), total.norm()
    for key, part in parts.items():
        require(
            error < 0.1 * part.norm() + 1e-6 * size,
            f"the gradient of the loss differs from that of the sum of "
            f"loss/* by {error:.3g}; {key} alone has {part.norm():.3g}: the term is added without its graph",
        )


def train_equals_eval(tested: ModelUnderTest) -> None:
    """The loss in train mode is that in eval mode; with dropout or other noise in training, it is so on average.

    Measured: the loss of one batch in eval, train and eval mode; a loss that varies in train mode is averaged over 16
    seeds and may differ by 25%.
    Causes: batch statistics; label smoothing or a loss term in one mode only; dropout with the two modes swapped; a
    MoE that drops tokens in training.
    """
    ids = tested.tokens()

    @torch.no_grad()
    def loss(model: BaseModel, train: bool, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return call(model.train(train), ids, targets=next_tokens(ids))[1]

    one, other = (loss(tested.build(), True, seed) for seed in (1, 2))
    expected = loss(tested.build(), False, 1)
    if (one - other).abs() > 1e-6 * one.abs():
        model = tested.build()
        mean = torch.stack([loss(model, True, seed) for seed in range(16)]).mean()
        require_close(mean, expected, "mean loss in train mode against eval mode", 0.25)
    else:
        require_close(one, expected, "loss in train mode against eval mode", 1e-5)


@torch.no_grad()
def logits_are_those_of_the_loss(tested: ModelUnderTest) -> None:
    """Logits returned along with the loss, when they are, equal those of inference.

    Measured: logits with targets against logits without.
    Causes: a training path of its own that has drifted from the other; logits scaled or capped on one path only; a
    target that is fed back into the network.
    """
    model, ids = tested.build(), tested.tokens()
    logits = call(model, ids, targets=next_tokens(ids))[0]
    if logits is None:
        raise NotApplicable("with targets the logits are None")
    require_close(logits, logits_of(model, ids), "logits with targets against logits without")


@torch.no_grad()
def eval_is_deterministic(tested: ModelUnderTest) -> None:
    """In eval mode the same input gives the same output, whatever was computed before.

    Measured: one input before and after inputs of other shapes and values, with the random generator elsewhere.
    Causes: dropout as `F.dropout(x, p)`, whose `training` is True by default; noise in a router; weights or
    projections drawn inside forward; a running average or a cache on the module.
    """
    model, ids = tested.build(), tested.tokens()
    torch.manual_seed(1)
    first = logits_of(model, ids)
    call(model, tested.tokens(2, max(1, ids.shape[1] - 3), seed=5))
    call(model, tested.tokens(1, seed=6), targets=tested.tokens(1, seed=7))
    torch.manual_seed(2)
    again = logits_of(model, ids)
    require_close(again, first, "the same input a second time", 1e-6)


def nothing_is_modified(tested: ModelUnderTest) -> None:
    """Forward and backward leave the inputs, the parameters and the buffers as they are.

    Measured: copies of input_ids, targets, doc_ids and the state_dict against what they are afterwards, in train mode.
    Causes: `input_ids[...] = `, `targets[targets == -100] = 0` or another in-place edit of an argument; batch
    statistics; a counter, a load or a routing bias that forward moves itself instead of `after_step`.
    """
    model = tested.build().train()
    inputs = {"input_ids": tested.tokens(), "targets": next_tokens(tested.tokens())}
    inputs["targets"].view(-1)[::5] = -100
    if tested.Model.accepts("doc_ids"):
        inputs["doc_ids"] = torch.zeros_like(inputs["targets"])
        inputs["doc_ids"][:, 4:] = 1
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    before = {k: v.clone() for k, v in _tensors(model).items()}
    ids = inputs["input_ids"]
    call(model, ids, **{k: v for k, v in inputs.items() if k != "input_ids"})[1].backward()
    with torch.no_grad():
        call(model, ids)
        call(model.eval(), ids, targets=inputs["targets"])
    for name, tensor in inputs.items():
        require(torch.equal(tensor, copies[name]), f"forward writes to {name}")
    changed = [k for k, v in _tensors(model).items() if k not in before or not torch.equal(v, before[k])]
    require(not changed, f"forward changes {', '.join(changed)}")


def _tensors(model: BaseModel) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def nothing_is_stored(tested: ModelUnderTest) -> None:
    """A call leaves nothing behind on the module: no attribute appears, vanishes or changes.

    Measured: all attributes of all submodules, scalars, strings, tensors and containers, before and after calls in
    train and eval mode, with a state where the model takes one.
    Causes: a key-value cache, a mask or a table kept on `self` for the next call; the auxiliary loss or the load left
    on `self` to be collected later (recomputation counts it twice); a step counter in forward."""
    model, ids = tested.build(), tested.tokens()
    before = snapshot(model)
    call(model.train(), ids, targets=next_tokens(ids))[1].backward()
    model.eval()
    drawn = []
    with torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            call(model, ids[:, :3])
            drawn.append(torch.rand(4))
        require(
            not torch.equal(*drawn),
            "forward sets the seed of the global random generator: every step would draw the same dropout",
        )
        if tested.Model.accepts("state"):
            call(model, ids[:, :3], state=model.init_state(len(ids)))
    changed = differences(before, snapshot(model))
    require(not changed, f"forward leaves something on the module: {', '.join(changed[:6])}")


def nothing_is_switched(tested: ModelUnderTest) -> None:
    """A call leaves every switch as it was: which parameters learn, train and eval mode, hooks, settings of torch.

    Measured: before and after calls in train and eval mode, with gradients on and off, without and with targets,
    doc_ids and a state: requires_grad, `.grad`, the modes, the hooks and the parameters themselves, and torch's
    gradient mode, default dtype and the like; in eval mode also the global random generators of torch and Python.
    Causes: `requires_grad_(False)` or `.eval()` in forward; `torch.set_grad_enabled(...)` as a call instead of `with`;
    `torch.set_default_dtype`; a hook or a parameter made in every call; noise drawn in eval mode and then not used.
    """
    ids, at_first = tested.tokens(), settings()
    for train in (True, False):
        for grad in (True, False):
            model, mode = tested.build().train(train), "train" if train else "eval"
            restore_settings(at_first)  # a first call, to find the gain of the weights, may have switched them
            inputs: list[dict] = [{}, {"targets": next_tokens(ids)}]
            if tested.Model.accepts("doc_ids"):
                inputs.append({"targets": next_tokens(ids), "doc_ids": torch.zeros_like(ids)})
            if tested.Model.accepts("state"):
                inputs.append({"state": model.init_state(len(ids))})
            for extra in inputs:
                with torch.set_grad_enabled(grad):
                    before, drawn = switches(model), (torch.get_rng_state(), random.getstate())
                    call(model, ids, **extra)
                    after = switches(model)
                changed = [f"{k} from {before.get(k)} to {after.get(k)}" for k in differences(before, after)]
                what = f"{mode} mode: a call with {' and '.join(extra) or 'input_ids alone'}"
                require(not changed, f"{what} switches {'; '.join(changed[:4])}")
                same = torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]
                require(train or same, f"{what} draws from the global random generator")


@torch.no_grad()
def longer_than_max_seq_len(tested: ModelUnderTest) -> None:
    """One token more than max_seq_len is refused, or computed as a model of a larger max_seq_len would.

    Measured: forward on max_seq_len + 1 tokens; when it does not raise, against a model built for twice the length with
    the same weights.
    Causes: positions clamped or wrapped around a table that has ended; the input silently cut to max_seq_len. Call
    `self.check_length(input_ids)` first in forward.
    """
    model, longest = tested.build(), tested.args.max_seq_len
    ids = tested.tokens(2, longest + 1)
    try:
        got = call(model, ids)[0]
    except Exception:
        return
    require(
        got.shape[1] == ids.shape[1],
        f"{ids.shape[1]} tokens in, logits for {got.shape[1]} out: the input is cut silently",
    )
    larger = tested.build(max_seq_len=2 * longest)
    weights = model.state_dict()
    if {k: v.shape for k, v in larger.state_dict().items()} != {k: v.shape for k, v in weights.items()}:
        require(False, f"{ids.shape[1]} tokens are accepted although the weights are made for {longest}")
    larger.load_state_dict(weights)
    require_close(got, logits_of(larger, ids), f"{ids.shape[1]} tokens against a model made for {2 * longest}")


def after_step_moves_buffers_only(tested: ModelUnderTest) -> None:
    """`after_step` moves persistent buffers in place, and nothing else: no parameter, no other buffer, no attribute.

    Measured: all parameters, buffers and attributes before and after ten calls with the values of a training step.
    Causes: weights clipped or averaged there; a counter or a schedule kept as a Python number, which no checkpoint
    holds; a buffer registered with `persistent=False`; a buffer replaced by one of another type or on another device.
    """
    model, ids = tested.build().train(), tested.tokens()
    other_vars = {k: v.detach() for k, v in call(model, ids, targets=next_tokens(ids))[2].items()}
    parameters = {name: param.detach().clone() for name, param in model.named_parameters()}
    persistent = model.state_dict().keys() - parameters.keys()
    before, forms = snapshot(model), _forms(model)
    with torch.no_grad():
        for _ in range(10):
            model.after_step(other_vars)
    moved = [name for name, param in model.named_parameters() if not torch.equal(param, parameters[name])]
    require(not moved, f"after_step moves the parameters {', '.join(moved[:6])}")
    changed = [name for name in differences(before, snapshot(model)) if name not in persistent]
    require(not changed, f"after_step changes {', '.join(changed[:6])}, which no checkpoint holds")
    for name, form in _forms(model).items():
        require(form == forms[name], f"after_step turns the buffer {name} from {forms[name]} into {form}")


def _forms(model: BaseModel) -> dict[str, tuple]:
    """Return {buffer: (shape, dtype, device)}."""
    return {name: (tuple(b.shape), b.dtype, b.device.type) for name, b in model.named_buffers()}


def declared_names_exist(tested: ModelUnderTest) -> None:
    """What a module names in `scalar_params`, `not_quantized` and `expert_weights` is there.

    Measured: each name against the attributes of its module: a parameter, or for `not_quantized` also a module.
    Causes: a misspelt or renamed weight, which then is quantized, or grouped by its shape, without a word; a string
    where a tuple of one is meant.
    """
    model = tested.build()
    kinds: dict[str, tuple[type, ...]] = {
        "scalar_params": (Tensor,),
        "expert_weights": (Tensor,),
        "not_quantized": (Tensor, torch.nn.Module),
    }
    for where, module in model.named_modules():
        for field, kind in kinds.items():
            names = getattr(module, field, ())
            what = f"{type(module).__name__}.{field} ({where or 'the model'})"
            require(not isinstance(names, str), f"{what} is the string {names!r}: write a tuple, ({names!r},)")
            missing = [name for name in names if not isinstance(getattr(module, name, None), kind)]
            unused = [name for name in missing if getattr(module, name, "") is None]  # switched off, such as a bias
            missing = [name for name in missing if name not in unused]
            require(not missing, f"{what} names {', '.join(map(repr, missing))}, which the module does not have")
