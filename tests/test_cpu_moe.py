"""The loop over experts against the formula, written down per expert and per token."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model.kernels import ENABLED
from model.kernels.cpu_moe import SEGMENT_STEP
from model.layers.moe import expert_load, expert_swiglu

needs_loop = pytest.mark.skipif(not ENABLED, reason="MINI_LLM_KERNELS=0: the loop is off")
N, D, E, A, INTER = SEGMENT_STEP + 5, 12, 6, 3, 8


def moe(dtype=torch.float64):
    """Leaves x, weight, gate, up, down, and a choice that leaves the last expert without tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = (N, D), (N, A), (E, INTER, D), (E, INTER, D), (E, D, INTER)
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return leaves, torch.rand(N, E - 1, generator=generator).topk(A).indices


def run(x, weight, gate, up, down, chosen):
    return expert_swiglu(x, chosen, weight, gate, up, down)


def formula(x, weight, gate, up, down, chosen):
    rows = []
    for token, weights, experts in zip(x, weight, chosen.tolist()):
        rows.append(sum(w * (down[e] @ (F.silu(gate[e] @ token) * (up[e] @ token))) for w, e in zip(weights, experts)))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_results_and_gradients(dtype, rounding):
    leaves, chosen = moe(dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want, got = formula(*exact, chosen), run(*leaves, chosen)
    assert expert_load(chosen, E).tolist() == [(chosen == e).sum() for e in range(E)]
    grads = torch.autograd.grad(got.square().sum(), leaves)
    for a, b in zip((got, *grads), (want, *torch.autograd.grad(want.square().sum(), exact)), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= rounding * b.norm()


@needs_loop
def test_padding_slots_are_not_used():
    """They hold the first token: if it is not finite, only its own results may be non-finite."""
    leaves, chosen = moe()
    chosen[0] = torch.tensor([0, 1, 2])
    with torch.no_grad():
        leaves[0][0] = float("inf")
        out = run(*leaves, chosen)
    assert out[1:].isfinite().all()


@needs_loop
def test_compiled_it_is_one_graph_for_every_load():
    leaves, chosen = moe()
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph

    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend=backend)
    for shift in range(3):
        other = (chosen + shift) % E
        torch.testing.assert_close(compiled(*leaves, other), formula(*leaves, other))
    assert len(frames) == 1


def test_its_flops_are_those_of_the_chosen_experts():
    leaves, chosen = moe()
    with FlopCounterMode(display=False) as counter:
        run(*leaves, chosen).sum().backward()
    assert counter.get_total_flops() == 3 * 6 * N * A * D * INTER
