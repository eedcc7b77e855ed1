"""Is it right under bf16 autocast and torch.compile?"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from checks.harness import ModelUnderTest, NotApplicable, call, logits_of, next_tokens, require, require_close
from checks.harness.float64 import Float64, in_float64
from checks.harness.model_under_test import LONG, CheckFailed
from model.basemodel import BaseModel, State


@torch.no_grad()
def bf16_stays_near_fp32(tested: ModelUnderTest) -> None:
    """Under bf16 autocast the logits and the loss stay near those of fp32, at the beginning and the end of a long
    sequence.

    Measured: over 300 tokens, the relative error of each token's logits. Its lower quartile (a token may take another
    expert for a rounding) may be 5%, and in no sixth of the sequence more than three times that of the first. The loss
    may differ by 2%.
    Causes: positions or their angles in the type of the activations (bf16 has no odd number above 256); a cumulative
    sum, a decay or a softmax over many tokens in bf16; logits or the loss in bf16; a constant such as -1e9 in a type
    that cannot hold it."""
    try:
        model, length = tested.build_long(), LONG
    except NotApplicable:
        model, length = tested.build(), tested.args.max_seq_len
    ids = tested.tokens(batch_size=2, length=length)
    want = logits_of(model, ids)
    want_loss = tested.task_loss(*call(model, ids, targets=next_tokens(ids))[1:]).item()
    with torch.autocast("cpu", torch.bfloat16):
        got = logits_of(model, ids).float()
        loss = tested.task_loss(*call(model, ids, targets=next_tokens(ids))[1:])
    require(got.isfinite().all(), "logits under bf16 autocast are not all finite")
    centred = want - want.mean(dim=-1, keepdim=True)
    error = ((got - want).norm(dim=-1) / centred.norm(dim=-1).clamp(min=1e-6)).mean(dim=0)  # (T,)
    parts = [part.quantile(0.25).item() for part in error.tensor_split(6)]
    seen = "relative errors of the logits, by sixth of the sequence: " + ", ".join(f"{part:.2%}" for part in parts)
    require(max(parts) < 0.05, seen)
    require(max(parts) < 3 * parts[0] + 0.003, f"{seen}: they grow with the position")
    require(loss.isfinite(), f"the loss under bf16 autocast is {loss.item()}")
    require(
        abs(loss.item() - want_loss) < 0.02 * abs(want_loss) + 0.02,
        f"the loss under bf16 autocast is {loss.item():.5g}, in fp32 {want_loss:.5g}",
    )


def bf16_gradients_are_finite(tested: ModelUnderTest) -> None:
    """Backward under bf16 autocast, matrices in bf16, gives finite gradients that point where those of fp32 point.

    Measured: at the initial weights and at weights of unit gain, all gradients finite; at the initial ones, where few
    tokens change their experts for a rounding, the cosine between the gradients of bf16 and fp32 is above 0.9.
    Causes: a custom backward that mixes dtypes; an exponential or a division that overflows; a scale that underflows;
    an fp32 computation, autocast off, on a bf16 matrix of the trainer: use `weight.float()`.
    """
    ids, grads = tested.tokens(), []
    for unit_gain, bf16 in ((True, True), (False, True), (False, False)):
        model = tested.build(unit_gain=unit_gain).train()
        for param in model.param_groups()["matrix"] if bf16 else ():
            param.data = param.data.bfloat16()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = call(model, ids, targets=next_tokens(ids))[1]
        loss.backward()
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        require(not bad, f"under bf16 autocast the gradient of {', '.join(bad[:4])} is not finite")
        grads.append(
            torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in model.parameters()]
            )
        )
    cosine = torch.nn.functional.cosine_similarity(grads[1], grads[2], dim=0).item()
    require(cosine > 0.9, f"the cosine between the gradients of bf16 and fp32 is {cosine:.3f}")


def large_weights_stay_finite(tested: ModelUnderTest) -> None:
    """Large weights, as they come with training, give large logits, losses and gradients, not infinity.

    Measured: matrices of 8 times unit gain, tables of the vocabulary of 64 times, sequences of eight tokens: the logits
    and the loss are finite. Over max_seq_len tokens, with matrices of 2 and 4 times unit gain: logits and gradients
    are finite where they are so in float64, and far from the limits of fp32.
    Causes: a softmax without subtracting the maximum; `log(softmax(x))` instead of `log_softmax`; an `exp` of something
    that grows, such as the two factors of a decay instead of their difference; a mask applied after an `exp`, whose
    gradient is 0 * infinity; a detour through half precision."""
    with torch.no_grad():
        model, ids = tested.build(), tested.tokens(length=min(8, tested.args.max_seq_len))
        _enlarge(model, 8)
        require(logits_of(model, ids).isfinite().all(), "with large weights the logits are not all finite")
        loss = call(model, ids, targets=next_tokens(ids))[1]
    require(loss.isfinite(), f"with large weights the loss is {loss.item()}")
    ids = tested.tokens(batch_size=2)
    for factor in (2, 4):
        bad = _non_finite(_enlarged(tested, factor), ids)
        if not bad:
            continue
        try:
            wide = in_float64(partial(_enlarged, tested, factor), ids)
        except NotApplicable:
            return  # nothing to compare with
        with Float64():
            require(
                _non_finite(wide, ids), f"with matrices of {factor} times unit gain {bad}; in float64 all is finite"
            )


def _enlarged(tested: ModelUnderTest, factor: float) -> BaseModel:
    model = tested.build()
    _enlarge(model, factor)
    return model


@torch.no_grad()
def _enlarge(model: BaseModel, factor: float) -> None:
    for param in model.parameters():
        if param.requires_grad and param.ndim >= 2:
            param.mul_(8 * factor if model.args.vocab_size in param.shape else factor)


def _non_finite(model: BaseModel, ids: Tensor) -> str:
    """Return what is not finite, or beyond 1e30, in logits and gradients, or ""."""
    with torch.no_grad():
        logits = logits_of(model, ids)
    if not (logits.abs() < 1e30).all():
        return "the logits are not all finite"
    call(model, ids, targets=next_tokens(ids))[1].backward()
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not (p.grad.abs() < 1e30).all()]
    return f"the gradient of {', '.join(bad[:4])} is not finite" if bad else ""


@torch.no_grad()
def recurrent_state_is_fp32(tested: ModelUnderTest) -> None:
    """A matrix that a state adds up over many tokens is in fp32, also when the model runs under bf16 autocast.

    Measured: which tensors of the state (B, ., ., .) are sums: those whose elements all move with every token, and
    still depend on what they were. Then their dtype under bf16 autocast. Keys, values, tails and ids may be of any.
    Causes: `memory.to(x.dtype)` before it is kept: a bf16 number has 8 bits, and forgets what is small beside it.
    """
    tested.needs("state")
    model, ids = tested.build(), tested.tokens(batch_size=2)
    half = ids.shape[1] // 2
    sums = _sums_in_state(model, ids, half)
    if not sums:
        raise NotApplicable("no matrix in the state is added up over tokens")
    with torch.autocast("cpu", torch.bfloat16):
        state = model.init_state(len(ids))
        for start, size in ((0, half), (half, 1)):
            logits_of(model, ids[:, start : start + size], state=state)
            state.advance(size)
    for where, name in sums:
        tensor = [*state.layers, state.model][where][name]
        place = f"state.layers[{where}]" if where < len(state.layers) else "state.model"
        require(
            torch.finfo(tensor.dtype).bits >= 32,
            f"{place}[{name!r}] is added up over tokens, and is {tensor.dtype} under autocast: keep it in fp32",
        )


def _sums_in_state(model: BaseModel, ids: Tensor, half: int) -> list[tuple[int, str]]:
    """Return (number of the dict, name) of the tensors that are sums: after a step most of their elements depend on
    what the tensor was, and are no copies of it."""
    state, found = model.init_state(len(ids)), []
    logits_of(model, ids[:, :half], state=state)
    state.advance(half)
    token = ids[:, half : half + 1]

    def step(state: State) -> list[dict]:
        logits_of(model, token, state=state)
        return [*state.layers, state.model]

    plain = step(state.clone())
    for where, tensors in enumerate([*state.layers, state.model]):
        for name, tensor in tensors.items():
            if tensor.ndim < 4 or not tensor.is_floating_point() or not tensor.numel():
                continue
            trial = state.clone()
            moved = [*trial.layers, trial.model][where][name]
            moved += 0.1 * torch.randn_like(moved) * (1 + moved.abs())
            old = moved.clone()
            new = step(trial)[where][name]
            if new.shape != plain[where][name].shape:
                continue
            depends = (new != plain[where][name]) & ~torch.isin(new, old)
            if depends.float().mean() > 0.5:
                found.append((where, name))
    return found


def compiled_equals_eager(tested: ModelUnderTest) -> None:
    """torch.compile gives the same loss and gradients, and does not recompile in every step.

    Measured: six training steps on different data with the backend "aot_eager_decomp_partition" (the trainer's compiler
    traces, differentiates and decomposes in this way; no code is generated), hooks called; the graphs compiled in each
    step are counted. First with fixed shapes, as the trainer compiles; where experts are gathered in a loop, whose
    sizes the data decides, shapes that vary are allowed, and then not every one of the last steps may compile.
    Causes: a Python number on the module, or taken from a tensor (`.item()`, `.tolist()`), that changes every step; a
    branch on the values of a tensor; a list that grows; an in-place edit that the tracer cannot see.
    """
    counts = _graphs_after_each_step(tested, dynamic=False, steps=6)
    if counts[-1] == counts[1]:
        return
    counts = _graphs_after_each_step(tested, dynamic=None, steps=10)
    new = [after - before for before, after in zip(counts[4:], counts[5:])]
    require(
        not all(new),
        f"graphs compiled after each of ten steps: {', '.join(map(str, counts))}; it should stay the "
        "same after the first few",
    )


def _graphs_after_each_step(tested: ModelUnderTest, dynamic: bool | None, steps: int) -> list[int]:
    torch._dynamo.reset()
    graphs, counts = [], []

    def backend(module: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager_decomp_partition")(module, inputs)

    eager, model = tested.build().train(), tested.build().train()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    # Beyond its limit the compiler gives up silently and runs the rest as it is: so the limit is lifted here.
    with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=1024):
        for step in range(steps):
            ids = tested.tokens(9, min(8, tested.args.max_seq_len), seed=30 + step)  # short: loops over time unroll
            model.before_step(step, steps)
            torch.manual_seed(step)
            _, loss, other_vars = compiled(ids, targets=next_tokens(ids))
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                _same_as_eager(eager, ids, loss, model)
            optimizer.step()
            model.after_step({k: v.detach() for k, v in other_vars.items()})
            counts.append(len(graphs))
    torch._dynamo.reset()
    return counts


def _same_as_eager(eager: BaseModel, ids: Tensor, loss: Tensor, model: BaseModel) -> None:
    """Compare the first step, before any weight has moved; models with dropout cannot be compared element by
    element."""
    eager.before_step(0, 6)
    torch.manual_seed(0)
    want = call(eager, ids, targets=next_tokens(ids))[1]
    if not torch.equal(want, call(eager, ids, targets=next_tokens(ids))[1]):
        return
    require_close(loss.detach(), want.detach(), "loss compiled against eager", 1e-4)
    want.backward()
    for name, param in eager.named_parameters():
        got = model.get_parameter(name).grad
        if param.grad is not None:
            if got is None:
                raise CheckFailed(f"compiled, {name} has no gradient")
            require_close(got, param.grad, f"gradient of {name}, compiled against eager", 1e-3)
