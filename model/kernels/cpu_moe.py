"""The experts of many tokens one after another, for a device without a grouped matmul: a CPU.

Each expert works on a segment of slots, one per token of its own, from the inputs to the results without leaving the
CPU's cache. To the compiler this is one operator: the loads are Python ints here, and each new load would be a
recompilation. Shapes: N tokens, D dim, E experts, A active experts per token, F ffn width of an expert, P slots.
"""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

# Segments are rounded up to a multiple of it: for every new number of rows the library prepares a kernel, which takes
# longer than the matmul. The padding slots hold the first token, with weight 0.
SEGMENT_STEP = 32


def looped_experts(x, chosen, weight, counts, gate, up, down):
    """Sum over each token's chosen experts of weight * down(silu(gate(x)) * up(x)), differentiable once.

    x (N, D), chosen and weight (N, A), counts (E,) tokens of each expert, gate and up (E, F, D), down (E, D, F), all
    of one dtype but chosen, counts and weight -> (N, D).
    """
    segments = (counts + SEGMENT_STEP - 1) // SEGMENT_STEP * SEGMENT_STEP
    expert = chosen.flatten()
    order = expert.argsort(stable=True)
    shift = (segments.cumsum(0) - segments) - (counts.cumsum(0) - counts)  # by the padding of the experts before
    slot = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device)) + shift[expert]
    n_slots = len(slot) + SEGMENT_STEP * len(counts)  # an upper bound: only the loop knows how many are in use
    token = slot.new_zeros(n_slots).scatter_(0, slot, torch.arange(len(slot), device=x.device) // chosen.shape[1])
    weight = x.new_zeros(n_slots).scatter(0, slot, weight.flatten().to(x.dtype))
    return torch.ops.mini_llm.expert_loop(x, weight, token, slot.view_as(chosen), segments, gate, up, down)[0]


def _forward(x, weight, token, slot, segments, gate, up, down):
    gate_out = x.new_empty(len(token), gate.shape[1])  # (P, F), before silu
    up_out = x.new_empty(len(token), gate.shape[1])
    out = x.new_empty(len(token), x.shape[1])
    for e, rows in enumerate(slices(segments)):
        inputs = x.index_select(0, token[rows])
        torch.mm(inputs, gate[e].T, out=gate_out[rows])
        torch.mm(inputs, up[e].T, out=up_out[rows])
        h = F.silu(gate_out[rows]).mul_(up_out[rows]).mul_(weight[rows, None])
        torch.mm(h, down[e].T, out=out[rows])
    return F.embedding_bag(slot, out, mode="sum"), gate_out, up_out


def _backward(grad, x, weight, token, slot, segments, gate, up, down, gate_out, up_out):
    grad_x = x.new_empty(len(token), x.shape[1])
    grad_weight = torch.empty_like(weight)
    grad_gate, grad_up, grad_down = (torch.empty_like(w) for w in (gate, up, down))
    for e, rows in enumerate(slices(segments)):
        inputs = x.index_select(0, token[rows])
        grad_out = grad.index_select(0, token[rows])
        activated = F.silu(gate_out[rows])
        h = activated * up_out[rows]
        grad_h = grad_out @ down[e]
        grad_weight[rows] = (grad_h * h).sum(dim=-1)
        grad_h.mul_(weight[rows, None])
        torch.mm(grad_out.T, h.mul_(weight[rows, None]), out=grad_down[e])  # zeros for an expert without tokens
        grad_up_out = activated.mul_(grad_h)
        grad_gate_out = torch.ops.aten.silu_backward(grad_h.mul_(up_out[rows]), gate_out[rows])
        torch.mm(grad_gate_out.T, inputs, out=grad_gate[e])
        torch.mm(grad_up_out.T, inputs, out=grad_up[e])
        torch.mm(grad_gate_out, gate[e], out=grad_x[rows])
        grad_x[rows].addmm_(grad_up_out, up[e])
    return F.embedding_bag(slot, grad_x, mode="sum"), grad_weight, grad_gate, grad_up, grad_down


def slices(counts):
    """Yield the segment of each expert as a slice, for segments of `counts` (E,) rows one after another."""
    start = 0
    for n in counts.tolist():
        yield slice(start, start + n)
        start += n


# ---------------------------------------------------------------- one operator to the compiler


def _fake_forward(x, weight, token, slot, segments, gate, up, down):
    gate_out, up_out = (x.new_empty(token.shape[0], gate.shape[1]) for _ in range(2))
    return x.new_empty(x.shape), gate_out, up_out


def _fake_backward(grad, x, weight, token, slot, segments, gate, up, down, gate_out, up_out):
    return tuple(t.new_empty(t.shape) for t in (x, weight, gate, up, down))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of the outputs that only the backward pass uses
    ctx.save_for_backward(*inputs, *output[1:])


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    grad_x, grad_weight, *grads = torch.ops.mini_llm.expert_loop_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight, None, None, None, *grads


def _flops(x, weight, token, slot, segments, gate, *_, **__):
    """For PyTorch's FLOP counter, which passes shapes and cannot see into an operator."""
    return 6 * slot.numel() * gate[1:].numel()


def _backward_flops(grad, *shapes, **__):
    return 2 * _flops(*shapes)


def register_operator(name, schema, run, fake, flops):
    torch.library.define(f"mini_llm::{name}", schema)
    torch.library.impl(f"mini_llm::{name}", "default", run)
    torch.library.register_fake(f"mini_llm::{name}", fake)
    register_flop_formula(getattr(torch.ops.mini_llm, name))(flops)


_INPUTS = "Tensor x, Tensor weight, Tensor token, Tensor slot, Tensor segments, Tensor gate, Tensor up, Tensor down"
register_operator("expert_loop", f"({_INPUTS}) -> (Tensor, Tensor, Tensor)", _forward, _fake_forward, _flops)
register_operator(
    "expert_loop_backward",
    f"(Tensor grad, {_INPUTS}, Tensor gate_out, Tensor up_out) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _backward_flops,
)
torch.library.register_autograd("mini_llm::expert_loop", _differentiate, setup_context=_setup_context)
