"""The experts of many tokens, one expert after the other: where the device has no product of many matrices at once.

Each expert works on a stretch of slots, one for each of its tokens, from its tokens' rows to theirs of the result
without leaving the processor's cache. For the compiler it is one operator: the loads, Python numbers here, would be a
new program each. Shapes as in experts.py, and P slots.
"""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

# Stretches are rounded up to a multiple of it: for every number of rows that it has not met of late the library
# prepares a kernel, which takes longer than the product. The spare slots hold the first token, with weight 0.
STEP = 32


def looped_experts(x, chosen, weight, counts, gate, up, down):
    """Sum over each token's chosen experts of weight * down(silu(gate(x)) * up(x)), differentiable once.

    x (N, D), chosen and weight (N, A), counts (E,) tokens of each expert, gate and up (E, F, D), down (E, D, F), all
    of one type but chosen, counts and weight -> (N, D).
    """
    stretches = (counts + STEP - 1) // STEP * STEP
    expert = chosen.flatten()
    order = expert.argsort(stable=True)
    shift = (stretches.cumsum(0) - stretches) - (counts.cumsum(0) - counts)  # by the spare slots of experts before
    slot = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device)) + shift[expert]
    n_slots = len(slot) + STEP * len(counts)  # at most: how many are in use only the loop knows
    token = slot.new_zeros(n_slots).scatter_(0, slot, torch.arange(len(slot), device=x.device) // chosen.shape[1])
    weight = x.new_zeros(n_slots).scatter(0, slot, weight.flatten().to(x.dtype))
    return torch.ops.mini_llm.expert_loop(x, weight, token, slot.view_as(chosen), stretches, gate, up, down)[0]


def _forward(x, weight, token, slot, stretches, gate, up, down):
    gated, upped = (x.new_empty(len(token), gate.shape[1]) for _ in range(2))  # (P, F), before silu
    out = x.new_empty(len(token), x.shape[1])
    for e, rows in enumerate(slices(stretches)):
        mine = x.index_select(0, token[rows])
        torch.mm(mine, gate[e].T, out=gated[rows])
        torch.mm(mine, up[e].T, out=upped[rows])
        h = F.silu(gated[rows]).mul_(upped[rows]).mul_(weight[rows, None])
        torch.mm(h, down[e].T, out=out[rows])
    return F.embedding_bag(slot, out, mode="sum"), gated, upped


def _backward(grad, x, weight, token, slot, stretches, gate, up, down, gated, upped):
    grad_x, grad_weight = x.new_empty(len(token), x.shape[1]), torch.empty_like(weight)
    grad_gate, grad_up, grad_down = (torch.empty_like(w) for w in (gate, up, down))
    for e, rows in enumerate(slices(stretches)):
        mine, grad_out = x.index_select(0, token[rows]), grad.index_select(0, token[rows])
        activated = F.silu(gated[rows])
        h = activated * upped[rows]
        grad_h = grad_out @ down[e]
        grad_weight[rows] = (grad_h * h).sum(dim=-1)
        grad_h.mul_(weight[rows, None])
        torch.mm(grad_out.T, h.mul_(weight[rows, None]), out=grad_down[e])  # an expert without tokens gets zeros
        grad_upped = activated.mul_(grad_h)
        grad_gated = torch.ops.aten.silu_backward(grad_h.mul_(upped[rows]), gated[rows])
        torch.mm(grad_gated.T, mine, out=grad_gate[e])
        torch.mm(grad_upped.T, mine, out=grad_up[e])
        torch.mm(grad_gated, gate[e], out=grad_x[rows])
        grad_x[rows].addmm_(grad_upped, up[e])
    return F.embedding_bag(slot, grad_x, mode="sum"), grad_weight, grad_gate, grad_up, grad_down


def slices(counts):
    """Yield the stretch of each expert, of counts (E,) rows one after the other."""
    start = 0
    for n in counts.tolist():
        yield slice(start, start + n)
        start += n


def _fake_forward(x, weight, token, slot, stretches, gate, up, down):
    gated, upped = (x.new_empty(token.shape[0], gate.shape[1]) for _ in range(2))
    return x.new_empty(x.shape), gated, upped


def _fake_backward(grad, x, weight, token, slot, stretches, gate, up, down, gated, upped):
    return tuple(t.new_empty(t.shape) for t in (x, weight, gate, up, down))


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of the results that only the backward pass uses
    ctx.save_for_backward(*inputs, *output[1:])


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    grad_x, grad_weight, *grads = torch.ops.mini_llm.expert_loop_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight, None, None, None, *grads


def _flops(x, weight, token, slot, stretches, gate, *_, **__):
    """For PyTorch's counter, which is given shapes and cannot look into an operator."""
    return 6 * slot.numel() * gate[1:].numel()


def _flops_of_backward(grad, *shapes, **__):
    return 2 * _flops(*shapes)


def _register():
    inputs = "Tensor x, Tensor weight, Tensor token, Tensor slot, Tensor stretches, Tensor gate, Tensor up, Tensor down"
    for name, schema, run, fake, flops in (
        ("expert_loop", f"({inputs}) -> (Tensor, Tensor, Tensor)", _forward, _fake_forward, _flops),
        (
            "expert_loop_backward",
            f"(Tensor grad, {inputs}, Tensor gated, Tensor upped) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
            _backward,
            _fake_backward,
            _flops_of_backward,
        ),
    ):
        torch.library.define(f"mini_llm::{name}", schema)
        torch.library.impl(f"mini_llm::{name}", "default", run)
        torch.library.register_fake(f"mini_llm::{name}", fake)
        register_flop_formula(getattr(torch.ops.mini_llm, name))(flops)
    torch.library.register_autograd("mini_llm::expert_loop", _differentiate, setup_context=_setup)


_register()
