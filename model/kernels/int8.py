"""Weights held in int8 for inference: an integer per weight and a scale per output."""

import torch
import torch.nn.functional as F
from torch import nn

from model import kernels

FEW_TOKENS = 8  # up to here a matmul is bound by reading the weights, beyond it by arithmetic
ALIGNED = 16  # the kernel for few tokens reads this many weights at once, beyond the end of a row of another length


class Int8Weight(nn.Module):
    """weight (..., F, D) as q (..., F, D) int8 times scale (..., F); the largest of each output is 127."""

    def __init__(self, weight):
        super().__init__()
        scale = weight.detach().float().abs().amax(dim=-1).clamp(min=1e-12) / 127
        self.register_buffer("q", (weight.detach().float() / scale[..., None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(weight.dtype))

    def dequantized(self):
        """Return the weight (..., F, D) in the dtype of the activations."""
        return self.q.to(self.scale.dtype) * self.scale[..., None]

    def __getitem__(self, expert):
        """Return the dequantized weight (F, D) of one expert of a stack."""
        return self.q[expert].to(self.scale.dtype) * self.scale[expert][..., None]

    def linear(self, x, expert=...):
        """x (..., D) times the weight (F, D), or that of one expert of a stack -> (..., F)."""
        q = self.q[expert]
        scale = self.scale[expert]
        tokens = x.reshape(-1, x.shape[-1])
        fits = kernels.ENABLED and tokens.shape[0] <= FEW_TOKENS and not q.shape[1] % ALIGNED
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and fits:
            out = torch._weight_int8pack_mm(tokens.contiguous(), q, scale)  # reads nothing but the int8 weights
        else:
            out = F.linear(tokens, q.to(x.dtype)) * scale.to(x.dtype)
        return out.view(*x.shape[:-1], q.shape[0])


class Int8Linear(nn.Module):
    """An `nn.Linear` with an int8 weight."""

    def __init__(self, linear):
        super().__init__()
        self.int8 = Int8Weight(linear.weight)
        self.bias = linear.bias
        self.weight_reads = 0  # of `weight`, outside compiled graphs

    @property
    def weight(self):
        """The dequantized weight (F, D), for a model that does more with it than this module's matmul."""
        self.weight_reads += not torch.compiler.is_compiling()
        return self.int8.dequantized()

    def forward(self, x):
        out = self.int8.linear(x)
        return out if self.bias is None else out + self.bias


@torch.no_grad()
def to_int8(model):
    """Quantize every `nn.Linear` of a model to int8, in place, and the stacks of experts that a module names in
    `expert_weights`. Embeddings, norms and all other weights stay as they are, and so does what a module names in
    `not_quantized`, stacks or modules with all that is in them. Returns the model.

    A Linear whose weight the model reads by itself would be dequantized for every token: a trial forward of two tokens
    finds those, and they stay as they are, too.
    """
    linears = {}
    kept = {id(part) for module in model.modules() for part in _kept_parts(module)}
    for module in list(model.modules()):
        for name in getattr(module, "expert_weights", ()):
            if id(getattr(module, name)) in kept:
                continue
            weight = Int8Weight(getattr(module, name))
            delattr(module, name)
            setattr(module, name, weight)
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and id(child) not in kept:
                linears[module, name] = child
                setattr(module, name, Int8Linear(child))
    _read_two_tokens(model)
    for (module, name), linear in linears.items():
        if getattr(module, name).weight_reads:
            setattr(module, name, linear)
    return model


def _kept_parts(module):
    """Yield the modules and parameters that a module names in `not_quantized`, with all that is in the modules."""
    for name in getattr(module, "not_quantized", ()):
        part = getattr(module, name, None)  # which this size of the model may lack
        yield part
        if isinstance(part, nn.Module):
            yield from part.modules()
            yield from part.parameters()


def _read_two_tokens(model):
    """One forward per token, the second as a decode step if the model keeps a state."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    state = model.init_state(1, 2) if model.accepts("state") else None
    for _ in range(2):
        if state is None:
            model(ids)
        else:
            model(ids, state=state)
            state.advance(1)
