"""The optimizers against formulas."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from checks import Subject
from engine.optim import Muon, build_optimizer, orthogonalize
from model import list_models


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 20), (2, 16, 60)])
def test_orthogonalize_is_near_the_polar_factor(shape):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    singular = torch.logspace(0, -1.5, shape[1]).expand(shape[0], -1)
    got = orthogonalize(u @ torch.diag_embed(singular) @ v)
    # The quintics leave singular values near 1 and do not turn the singular vectors.
    core = u.mT @ got @ v.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert 0.7 < values.min() and values.max() < 1.25
    torch.testing.assert_close(core, torch.diag_embed(values), atol=1e-3, rtol=0)


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
        optimizer.step()
    for param, expected in zip(params, want):
        torch.testing.assert_close(param.detach(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_moves_and_only_matrices_decay(name, optimizer):
    model = Subject(name).build().train()
    config = SimpleNamespace(
        optimizer=optimizer, max_lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, embed_lr_scale=0.5, scalar_lr_scale=1.0
    )
    combined = build_optimizer(model, config)
    combined.set_lr(2e-2)
    groups = {id(p): g for g in combined.param_groups for p in g["params"]}
    assert groups[id(model.tok_embed.weight)]["lr"] == 1e-2
    matrices = {id(p) for p in model.param_groups()["matrix"]}
    for param in model.parameters():
        assert (groups[id(param)]["weight_decay"] > 0) == (id(param) in matrices)
    before = [p.detach().clone() for p in model.parameters()]
    ids = Subject(name).tokens(rows=8)
    model(ids, targets=ids.roll(-1, 1))[1].backward()
    combined.step()
    assert all((p != b).any() for p, b in zip(model.parameters(), before))


def test_unknown_group_member_is_refused():
    model = Subject(list_models()[0]).build()
    model.extra = nn.Parameter(torch.zeros(3))
    groups = model.param_groups()
    groups["scalar"] = [p for p in groups["scalar"] if p is not model.extra]
    model.param_groups = lambda: groups
    with pytest.raises(AssertionError, match="exactly once"):
        build_optimizer(model, SimpleNamespace(optimizer="muon"))
