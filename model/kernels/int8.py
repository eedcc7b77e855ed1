"""Weights held at 8 bits for inference: a whole number a weight and one scale an output channel."""

import torch
import torch.nn.functional as F
from torch import nn

FEW_ROWS = 8  # up to here a product is bound by reading the weights, beyond it by arithmetic
PACKED = 16  # the kernel for them reads so many weights at a time, past the end of a row that is no multiple of it


class Int8Weight(nn.Module):
    """weight (..., F, D) as q (..., F, D) int8 times scale (..., F), the largest of each row at 127."""

    def __init__(self, weight):
        super().__init__()
        scale = weight.detach().float().abs().amax(dim=-1).clamp(min=1e-12) / 127
        self.register_buffer("q", (weight.detach().float() / scale[..., None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(weight.dtype))

    def unpacked(self):
        """The weight as it is used, in the type of the activations."""
        return self.q.to(self.scale.dtype) * self.scale[..., None]

    def linear(self, x, expert=...):
        """x (..., D) times weight (F, D), of a stack that of one expert -> (..., F)."""
        q, scale, rows = self.q[expert], self.scale[expert], x.reshape(-1, x.shape[-1])
        fits = rows.shape[0] <= FEW_ROWS and not q.shape[1] % PACKED
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and fits:
            out = torch._weight_int8pack_mm(rows.contiguous(), q, scale)  # reads the 8 bits, nothing else
        else:
            out = F.linear(rows, q.to(x.dtype)) * scale.to(x.dtype)
        return out.view(*x.shape[:-1], q.shape[0])


class Int8Linear(nn.Module):
    """An `nn.Linear` whose weight is held at 8 bits."""

    def __init__(self, linear):
        super().__init__()
        self.int8, self.bias, self.asked = Int8Weight(linear.weight), linear.bias, 0

    @property
    def weight(self):
        """The weight as it is used, for whoever wants more of it than its product."""
        self.asked += not torch.compiler.is_compiling()
        return self.int8.unpacked()

    def forward(self, x):
        out = self.int8.linear(x)
        return out if self.bias is None else out + self.bias


@torch.no_grad()
def to_int8(model):
    """Hold every `nn.Linear` of a model at 8 bits, in place, and the stacks of experts that a module names in
    `expert_weights`; embeddings, norms and all that stands in neither stay as they are.

    A Linear whose weight the model reads by itself would be unpacked for every token: a trial of two tokens finds
    those, and they stay as they are too.
    """
    linears = {}
    for module in list(model.modules()):
        for name in getattr(module, "expert_weights", ()):
            weight = Int8Weight(getattr(module, name))
            delattr(module, name)
            setattr(module, name, weight)
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                linears[module, name] = child
                setattr(module, name, Int8Linear(child))
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    state = {"state": model.init_state(1, 2)} if model.accepts("state") else {}
    for _ in range(2):
        model(ids, **state)
        if state:
            state["state"].advance(1)
    for (module, name), linear in linears.items():
        if getattr(module, name).asked:
            setattr(module, name, linear)
    return model
