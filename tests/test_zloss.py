"""The z-loss against the formula on plain logits, and what happens to models without it."""

import pytest
import torch
import torch.nn.functional as F

from checks import ModelUnderTest
from engine.training.validate_forward import checked
from model import BaseModel, list_models
from model.layers import lm_loss
from utils.errors import UserError


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 50 * 3, 16 << 20])  # a token, three tokens, all of them per chunk
def test_squares_and_entropy_equal_the_formula(chunk_bytes):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 7, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (2, 7))
    targets[0, :3] = -100
    squares = []
    entropy = lm_loss(hidden, weight, targets, chunk_bytes, squares)
    got = torch.autograd.grad(2 * entropy + 0.3 * squares[0], (hidden, weight))

    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = (h @ w.T)[targets != -100]
    want_entropy, want_squares = F.cross_entropy(logits, targets[targets != -100]), logits.logsumexp(-1).square().mean()
    want = torch.autograd.grad(2 * want_entropy + 0.3 * want_squares, (h, w))
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares[0].double(), want_squares, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [torch.full((2, 3), -100), torch.zeros(2, 0, dtype=torch.long)])
def test_without_a_valid_target_it_is_zero_with_a_graph(targets):
    hidden, weight = torch.randn(*targets.shape, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    squares = []
    loss = lm_loss(hidden, weight, targets, squares=squares) + squares[0]
    assert loss.item() == 0
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("name", list_models())
def test_a_model_reports_the_term_and_its_gradient(name):
    """loss == sum of loss/*, and the gradient is the loss's derivative, measured by a small step along it."""
    model_under_test = ModelUnderTest(name)
    model, ids = model_under_test.build(unit_gain=False).train(), model_under_test.tokens(batch_size=3)
    targets = ids.roll(-1, 1)
    plain, without = model(ids, targets=targets)[1:]
    assert "loss/z" not in without
    model.z_loss = 0.1
    _, loss, other_vars = model(ids, targets=targets)
    assert other_vars["loss/z"] > 0 and torch.isclose(loss, plain + other_vars["loss/z"])
    assert torch.isclose(loss, sum(v for k, v in other_vars.items() if k.startswith("loss/")))
    head = model.tok_embed.weight
    (gradient,) = torch.autograd.grad(other_vars["loss/z"], head)
    step = 1e-3 / gradient.norm()
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            head += sign * step * gradient
            values.append(model(ids, targets=targets)[2]["loss/z"].double())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx((gradient**2).sum().item(), rel=0.05)


def test_a_model_without_the_term_is_one_line():
    def forward(input_ids, targets):
        return None, torch.zeros((), requires_grad=True), {}

    with pytest.raises(UserError, match="--z_loss=0.0001 needs a term loss/z: .* set --z_loss=0"):
        checked(forward, BaseModel, 1e-4)(input_ids=None, targets=None)


@pytest.mark.slow
def test_compiled_it_is_the_same_and_compiles_once():
    model_under_test = ModelUnderTest(list_models()[-1])
    model, ids = model_under_test.build().train(), model_under_test.tokens(batch_size=3)
    model.z_loss = 0.1
    targets = ids.roll(-1, 1)
    compiled = torch.compile(model, dynamic=False)
    for _ in range(3):
        model.zero_grad()
        eager = model(ids, targets=targets)[1]
        eager.backward()
        wanted = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        loss = compiled(ids, targets=targets)[1]
        loss.backward()
        torch.testing.assert_close(loss, eager, rtol=1e-5, atol=1e-5)
        for p, want in zip(model.parameters(), wanted):
            torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-5)
        frames = torch._dynamo.utils.counters["frames"]["total"]
    assert torch._dynamo.utils.counters["frames"]["total"] == frames
