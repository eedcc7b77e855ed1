"""The optimizers against formulas."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from checks import ModelUnderTest
from engine.training import muon
from engine.training.conditional import copy_if, zero_unless
from engine.training.config import TrainConfig
from engine.training.ema import EMA
from engine.training.muon import Muon, orthogonalize
from engine.training.optim import CombinedOptimizer, build_optimizer
from tests.support.checkpoints import config_with
from tests.support.models import BASE_MODEL, SHIPPED

GOOD, BAD = torch.tensor(True), torch.tensor(False)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 20), (2, 16, 60), (9, 200, 250)])
def test_orthogonalize_is_near_the_polar_factor(shape, bf16, monkeypatch):
    monkeypatch.setattr(muon, "fast_bf16", lambda device: bf16)
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    singular = torch.logspace(0, -1.5, shape[1]).expand(shape[0], -1)
    got = orthogonalize(u @ torch.diag_embed(singular) @ v)
    # The quintics leave singular values near 1 and do not turn the singular vectors.
    core = u.mT @ got @ v.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert 0.7 < values.min() and values.max() < 1.25
    torch.testing.assert_close(core, torch.diag_embed(values), atol=3e-2 if bf16 else 1e-3, rtol=0)


def test_muon_step_equals_the_formula():
    """Two steps on a tall matrix and a stack, by hand: Nesterov momentum, polar factor, 0.2 sqrt(max dim), decay."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(20, 12)), nn.Parameter(torch.randn(3, 12, 20))]
    want = [p.detach().clone() for p in params]
    moments = [torch.zeros_like(p) for p in params]
    optimizer = Muon(params, lr=0.1, weight_decay=0.5, momentum=0.9)
    for _ in range(2):
        for i, param in enumerate(params):
            param.grad = torch.randn_like(param)
            moments[i] = 0.9 * moments[i] + 0.1 * param.grad
            direction = 0.1 * param.grad + 0.9 * moments[i]
            stack = direction if direction.ndim == 3 else direction[None]
            wide = stack if stack.shape[-2] <= stack.shape[-1] else stack.mT
            update = torch.stack([orthogonalize(matrix[None])[0] for matrix in wide])
            update = update if stack.shape[-2] <= stack.shape[-1] else update.mT
            want[i] = want[i] * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 20**0.5 * update.reshape(param.shape)
        optimizer.step(GOOD)
    for param, expected in zip(params, want):
        torch.testing.assert_close(param.detach(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_moves_and_only_matrices_decay(name, optimizer):
    model = ModelUnderTest(name).build().train()
    combined = build_optimizer(model, config_with(optimizer=optimizer, embed_lr_scale=0.5))
    combined.set_lr(2e-2)
    groups = {id(p): g for g in combined.param_groups for p in g["params"]}
    assert groups[id(model.tok_embed.weight)]["lr"] == 1e-2
    matrices = {id(p) for p in model.param_groups()["matrix"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    for param in trained:
        assert (groups[id(param)]["weight_decay"] > 0) == (id(param) in matrices)
    before = [p.detach().clone() for p in trained]
    ids = ModelUnderTest(name).tokens(batch_size=8)
    model(ids, targets=ids.roll(-1, 1))[1].backward()
    combined.step(GOOD)
    assert all((p != b).any() for p, b in zip(trained, before))


@pytest.mark.parametrize("name", SHIPPED)
def test_adamw_equals_the_formula(name):
    """Three steps of a model's parameters against Loshchilov and Hutter's algorithm 2 in float64."""
    model = ModelUnderTest(name).build().train()
    config = config_with(optimizer="adamw", betas=(0.8, 0.9), embed_lr_scale=3.0, scalar_lr_scale=0.5)
    optimizer = build_optimizer(model, config)
    groups = model.param_groups()
    scales = {"matrix": 1.0, "embed": 3.0, "scalar": 0.5}
    want = {id(p): p.detach().double().clone() for p in model.parameters()}
    first = {key: torch.zeros_like(value) for key, value in want.items()}
    second = {key: torch.zeros_like(value) for key, value in want.items()}
    for step, lr in enumerate((0.01, 0.02, 0.005), start=1):
        ids = ModelUnderTest(name).tokens(batch_size=2, seed=step)
        model(ids, targets=ids.roll(-1, 1))[1].backward()
        for kind, params in groups.items():
            for p in params:
                g, key = p.grad.double(), id(p)
                first[key] = 0.8 * first[key] + 0.2 * g
                second[key] = 0.9 * second[key] + 0.1 * g**2
                update = first[key] / (1 - 0.8**step) / ((second[key] / (1 - 0.9**step)).sqrt() + 1e-8)
                decay = 0.1 if kind == "matrix" else 0.0
                want[key] -= lr * scales[kind] * (update + decay * want[key])
        optimizer.set_lr(lr)
        optimizer.step(GOOD)
        optimizer.zero_grad()
    for p in model.parameters():
        torch.testing.assert_close(p.detach().double(), want[id(p)], atol=1e-5, rtol=1e-4)


def test_ema_equals_the_weighted_sum_and_a_second_swap_restores():
    """After 40 updates: the weighted sum over all past values, by hand; swapped in and out without a trace."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(5, 3))
    average = EMA([param], decay=0.7)
    values, weights = [], []
    for n in range(1, 41):
        param.data.normal_()
        values.append(param.detach().double().clone())
        average.step(GOOD)
        decay = min(0.7, n / (n + 9))
        weights = [w * decay for w in weights] + [1 - decay if n > 1 else 1.0]  # the first value starts the average
    want = sum(w * value for w, value in zip(weights, values))
    assert sum(weights) == pytest.approx(1)
    now = param.detach().clone()
    optimizer = CombinedOptimizer(average=average)
    with optimizer.averaged():
        torch.testing.assert_close(param.detach().double(), want, atol=1e-6, rtol=1e-5)
    assert torch.equal(param, now)


def moved(optimizer, model, steps):
    """Steps by fixed gradients, of which a bad one holds a NaN; returns every byte of weights and states."""
    for number, good in steps:
        for at, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * number + at))
            p.grad.view(-1)[0] = p.grad.view(-1)[0] if good else torch.nan
        optimizer.set_lr(0.01)
        optimizer.step(GOOD if good else BAD)
        optimizer.zero_grad()
    states = [state[key] for part in optimizer.all for state in part.state.values() for key in sorted(state)]
    return [tensor.detach().numpy().tobytes() for tensor in [*model.parameters(), *states]]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("recipe", [{"optimizer": "adamw"}, {"optimizer": "muon"}, {"optimizer": "muon", "ema": 0.9}])
def test_a_skipped_step_leaves_every_bit_as_it_was(name, recipe):
    """After two steps, and before the first as well: the steps after it are those of the run without it."""

    def run(*steps):
        model = ModelUnderTest(name).build().train()
        with torch.no_grad():
            next(model.parameters()).view(-1)[:4] = torch.tensor(
                [0.0, -0.0, 1e-40, -1e-40]
            )  # signs, and subnormal values
        return moved(build_optimizer(model, TrainConfig(**recipe)), model, steps)

    taken = run((1, True), (2, True))
    assert run((1, True), (2, True), (7, False)) == taken
    assert run((7, False), (1, True), (8, False), (9, False), (2, True)) == taken != run((1, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (16, 1)])
def test_a_step_is_taken_or_not_by_bits_of_any_type(dtype, shape):
    new, old = torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, 2.0, dtype=dtype)
    copy_if(torch.tensor(False), new, old)
    assert (old == 2).all()
    copy_if(torch.tensor(True), torch.full(shape, 3.0, dtype=dtype), old)
    assert (old == 3).all()
    assert (zero_unless(torch.tensor(True), old) == 3).all()
    assert (zero_unless(torch.tensor(False), new.fill_(float("nan"))) == 0).all()


def test_unknown_group_member_is_refused():
    model = ModelUnderTest(BASE_MODEL).build()
    model.extra = nn.Parameter(torch.zeros(3))
    groups = model.param_groups()
    groups["scalar"] = [p for p in groups["scalar"] if p is not model.extra]
    model.param_groups = lambda: groups
    with pytest.raises(AssertionError, match="exactly once"):
        build_optimizer(model, SimpleNamespace(optimizer="muon"))
