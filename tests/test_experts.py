"""Experts of any form: sorted tokens, few tokens, in a graph, int8 and packed stacks, with and without biases."""

import pytest
import torch
from torch import nn

from model import kernels
from model.kernels import decode
from model.kernels.int8 import Int8Weight, to_int8
from model.kernels.packed import Packed
from model.kernels.prepare import packed_copy
from model.layers import expert_linear, experts
from tests.support.decode_kernels import why_not_built

E, D, FF, A = 5, 12, 7, 2


class Clipped(nn.Module):
    """Experts with biases, and an activation of their own."""

    expert_weights = ("up_proj", "down_proj")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up_proj = nn.Parameter(torch.randn(E, FF, D))
        self.up_bias = nn.Parameter(torch.randn(E, FF))
        self.down_proj = nn.Parameter(torch.randn(E, D, FF))

    def expert(self, x, e):
        h = expert_linear(x, self.up_proj, e, self.up_bias).clamp(max=2).sigmoid()
        return expert_linear(h, self.down_proj, e)

    def forward(self, x, chosen, weight):
        return experts(x, chosen, weight, self.expert, E)


def batch(n_tokens, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n_tokens)
    chosen = torch.stack([torch.randperm(E - 1, generator=generator)[:A] for _ in range(n_tokens)])  # the last has none
    x, weight = torch.randn(n_tokens, D, generator=generator), torch.rand(n_tokens, A, generator=generator)
    return x.to(dtype), chosen, weight.to(dtype)


def loop(moe, x, chosen, weight):
    out = []
    for token, numbers, shares in zip(x, chosen.tolist(), weight):
        parts = []
        for e in numbers:
            h = (moe.up_proj[e] @ token + moe.up_bias[e]).clamp(max=2).sigmoid()
            parts.append(moe.down_proj[e] @ h)
        out.append(shares @ torch.stack(parts))
    return torch.stack(out)


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 40])
def test_values_and_gradients_are_those_of_the_loop(n_tokens):
    moe = Clipped().double()
    x, chosen, weight = batch(n_tokens)
    inputs = [x.requires_grad_(), weight.requires_grad_(), *moe.parameters()]
    want, got = loop(moe, x, chosen, weight), moe(x, chosen, weight)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.square().sum(), inputs, materialize_grads=True) for out in (got, want)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(moe(x, chosen, weight), want)


@pytest.mark.parametrize("n_tokens", [1, 16, 17, 40])
@pytest.mark.skipif(not kernels.ENABLED, reason="MINI_LLM_KERNELS=0: the loop over experts reads values")
def test_graphs_compute_the_same(n_tokens):
    moe = Clipped()
    x, chosen, weight = batch(n_tokens, torch.float32)
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True, dynamic=False)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            torch.testing.assert_close(compiled(x, chosen, weight), loop(moe, x, chosen, weight), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 40])
@torch.no_grad()
def test_int8_stacks_are_their_dequantized_weights(n_tokens):
    moe = Clipped()
    held, near = Clipped(), Clipped()
    for name in moe.expert_weights:
        weight = Int8Weight(getattr(moe, name))
        setattr(near, name, nn.Parameter(weight.dequantized()))
        delattr(held, name)
        setattr(held, name, weight)
    x, chosen, weight = batch(n_tokens, torch.float32)
    torch.testing.assert_close(held(x, chosen, weight), near(x, chosen, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not kernels.ENABLED or bool(why_not_built()), reason="the C++ kernels are off or cannot be built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [1, 3, 40])
@torch.no_grad()
def test_packed_stacks_compute_the_same(n_tokens, dtype):
    moe = Clipped().to(dtype)
    copied = packed_copy(moe, experts_only=True)
    assert isinstance(copied.up_proj, Packed)
    x, chosen, weight = batch(n_tokens, dtype)
    want = moe(x, chosen, weight)
    rounding = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.05)
    torch.testing.assert_close(copied(x, chosen, weight), want, **rounding)
    rows = torch.ops.mini_llm.expert_linear(x, chosen[:, 0], copied.up_proj.weight, None, FF)
    torch.testing.assert_close(rows, torch.einsum("nd,nfd->nf", x, moe.up_proj[chosen[:, 0]]), **rounding)
    with pytest.raises(IndexError):
        torch.ops.mini_llm.expert_linear(x, chosen[:, 0] + E, copied.up_proj.weight, None, FF)


class Parts(nn.Module):
    not_quantized = ("decay_proj", "inner", "down_proj")
    expert_weights = ("up_proj", "down_proj")

    def __init__(self):
        super().__init__()
        self.decay_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16)))
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(2, 4, 16)), nn.Parameter(torch.randn(2, 16, 4))


def test_what_a_module_names_is_not_quantized(monkeypatch):
    monkeypatch.setattr("model.kernels.int8._read_two_tokens", lambda model: None)
    model = to_int8(nn.Sequential(Parts(), nn.Linear(16, 16)))
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name.count(".") or name == "1"}
    assert kinds["0.v_proj"] == kinds["1"] == "Int8Linear" and kinds["0.up_proj"] == "Int8Weight"
    assert all(kinds[name] == "Linear" for name in ("0.decay_proj", "0.inner.0", "0.inner.1.0"))
    assert isinstance(model[0].down_proj, nn.Parameter)


def test_the_operators_are_registered_with_fakes_and_gradients():
    stack, bias = torch.randn(E, FF, D, requires_grad=True), torch.randn(E, FF, requires_grad=True)
    x, counts = torch.randn(6, D, requires_grad=True), torch.tensor([1, 0, 3, 2, 0])
    for of_bias in (bias, None):
        torch.library.opcheck(torch.ops.mini_llm.segment_linear, (x, counts, stack, of_bias))
    if not kernels.ENABLED or why_not_built():
        pytest.skip("the C++ kernels are off or cannot be built")
    decode.load()
    stack = Packed.of(torch.randn(E, FF, D))
    inputs = torch.randn(3, D), torch.tensor([0, 4, 0]), stack.weight, None, FF
    torch.library.opcheck(torch.ops.mini_llm.expert_linear, inputs, test_utils="test_faketensor")
