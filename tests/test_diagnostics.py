"""The diagnostics against figures computed by hand, and the warnings when something fails."""

import copy
import math

import pytest
import torch
from torch import nn

from checks import ModelUnderTest
from engine.training.diagnostics import SETTLED, Diagnostics
from tests.support.models import SHIPPED
from tests.support.tiny_model import TinyModel, TinyModelArgs


def one_step(model, diagnostics, ids, lr=0.1, step=1, other_vars=None):
    """A step of gradient descent with diagnostics; returns (figures, gradients, weights before)."""
    diagnostics.watch()
    model.zero_grad()
    model(ids, targets=ids.roll(-1, 1))[1].backward()
    diagnostics.before_update()
    before = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= lr * p.grad
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return diagnostics.after_update(step, other_vars or {}), gradients, before


@pytest.mark.parametrize("name", SHIPPED)
def test_norms_and_updates_of_any_model(name):
    model, ids = ModelUnderTest(name).build().train(), ModelUnderTest(name).tokens(batch_size=2)
    outputs = {}
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _m, _i, out, i=i: outputs.update({i: out[0] if type(out) is tuple else out}))
    figures, gradients, before = one_step(model, Diagnostics(model), ids)
    for i in range(len(model.layers)):
        inside = [g.double() for n, g in gradients.items() if n.startswith(f"layers.{i}.")]
        want = math.sqrt(sum((g**2).sum().item() for g in inside))
        assert figures[f"gradient_norm/layer_{i:02d}"].item() == pytest.approx(want, rel=1e-4)
        rms = outputs[i].double().square().mean().sqrt().item()
        assert figures[f"activation_rms/layer_{i:02d}"].item() == pytest.approx(rms, rel=1e-4)
    assert figures["gradient_norm/embed"].item() == pytest.approx(gradients["tok_embed.weight"].norm().item(), rel=1e-4)
    of_group = {id(p): kind for kind, params in model.param_groups().items() for p in params}
    for kind in ("matrix", "embed", "scalar"):
        pairs = [
            (now.double(), old.double())
            for now, old in zip(model.parameters(), before.parameters())
            if of_group.get(id(now)) == kind
        ]
        moved, size = (
            math.sqrt(sum((t**2).sum().item() for t in tensors))
            for tensors in ([now - old for now, old in pairs], [old for _, old in pairs])
        )
        assert figures[f"update_to_weight/{kind}"].item() == pytest.approx(moved / size, rel=1e-3)
    assert not any(layer._forward_hooks for layer in model.layers if len(layer._forward_hooks) > 1)


def test_loads_become_entropy_and_the_least_share():
    load = torch.tensor([[10.0, 10, 10, 10], [40, 0, 0, 0], [30, 5, 4, 1]])
    model = tiny()
    other_vars = {"moe/load": load, "moe/other": load, "x": load[0]}
    figures, _, _ = one_step(model, Diagnostics(model), ids(), other_vars=other_vars)
    assert figures["routing_entropy/load_00"].item() == pytest.approx(1)
    assert figures["routing_entropy/load_01"].item() == pytest.approx(0)
    want = -sum(p * math.log(p) for p in (30 / 40, 5 / 40, 4 / 40, 1 / 40)) / math.log(4)
    assert figures["routing_entropy/load_02"].item() == pytest.approx(want)
    assert [round(figures[f"least_load/load_0{i}"].item(), 4) for i in range(3)] == [1, 0, 0.1]
    assert sum("other" in name for name in figures) == 0


def tiny(unused=False):
    torch.manual_seed(0)
    model = TinyModel(TinyModelArgs(vocab_size=50, max_seq_len=32))
    model.unused = nn.Parameter(torch.ones(3)) if unused else None
    return model


def ids():
    return torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1))


def test_problems_are_logged_once_until_they_are_over(capsys):
    model = tiny(unused=True)
    diagnostics = Diagnostics(model)
    underused, fed = torch.tensor([[1.0, 99, 100]]), torch.tensor([[60.0, 70, 70]])
    lines = []
    for step, load in enumerate([fed, underused, underused, underused, underused, fed, *[underused] * 3], start=1):
        one_step(model, diagnostics, ids(), step=step, other_vars={"moe/load": load})
        lines.append(capsys.readouterr().err)
    assert "step 1: the gradient norm of scalar is zero" in lines[0]  # TinyModel leaves a parameter out of its graph
    assert (
        lines[1] == lines[2] == ""
        and "step 4: expert 0 of moe/load, MoE layer 0, is underused: it gets 1.5%" in lines[3]
    )
    assert lines[4:8] == [""] * 4 and "step 9: expert 0" in lines[8] and "scalar" not in lines[8]


def test_experts_without_tokens_in_turn_are_not_underused(capsys):
    """As by chance in the first steps of a small MoE."""
    model = tiny()
    diagnostics = Diagnostics(model)
    for step in range(1, 10):
        load = torch.full((1, 4), 10.0)
        load[0, step % 4] = 0
        one_step(model, diagnostics, ids(), step=step, other_vars={"moe/load": load})
    assert "is underused" not in capsys.readouterr().err


def test_a_norm_that_explodes_is_named(capsys):
    model = tiny()
    diagnostics = Diagnostics(model)
    for step in range(SETTLED):
        one_step(model, diagnostics, ids(), lr=0.0, step=step)
    assert capsys.readouterr().err == ""
    with torch.no_grad():
        model.lm_head.weight *= 100
    one_step(model, diagnostics, ids(), lr=0.0, step=8)
    output = capsys.readouterr().err
    assert "step 8: the gradient norm of layer 00 is" in output and "layer 01" in output and "activation" not in output
    with torch.no_grad():
        model.layers[0].weight[0, 0] = float("nan")
    one_step(model, diagnostics, ids(), lr=0.0, step=9)
    assert "step 9: the activation rms of layer 00 is nan" in capsys.readouterr().err


def test_no_hooks_on_a_compiled_model():
    model = tiny()
    figures, _, _ = one_step(model, Diagnostics(model, hooks=False), ids())
    assert not any(name.startswith("activation") for name in figures) and "gradient_norm/layer_00" in figures
