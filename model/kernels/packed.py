"""Weights in the layout of the decode kernels, and the modules that compute with them.

Shapes: N tokens, D inputs, F outputs, E experts, A active experts per token.
"""

from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import nn

from model.kernels.int8 import Int8Linear, Int8Weight

BLOCK = 32  # outputs that are computed together
PER_STEP = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # inputs that are read together


def pack(weight):
    """Lay out a weight (..., F, D), fp32, bf16 or int8, as decode.cpp reads it: (..., F / 32, steps, 32, per step)."""
    per_step = PER_STEP[weight.dtype]
    weight = F.pad(weight, (0, -weight.shape[-1] % per_step, 0, -weight.shape[-2] % BLOCK))
    return weight.unflatten(-1, (-1, per_step)).unflatten(-3, (-1, BLOCK)).transpose(-3, -2).contiguous()


class Packed(nn.Module):
    """A packed weight (..., F, D) for inference; int8 weights with a scale per output."""

    def __init__(self, weight, scale=None):
        super().__init__()
        self.n_outputs = weight.shape[-2]
        self.register_buffer("weight", pack(weight), persistent=False)
        scale = None if scale is None else F.pad(scale.float(), (0, -self.n_outputs % BLOCK))
        self.register_buffer("scale", scale, persistent=False)

    @classmethod
    def of(cls, weight):
        """Pack a tensor or an `Int8Weight`; None where there is no kernel for its dtype."""
        if isinstance(weight, Int8Weight):
            return cls(weight.q, weight.scale) if weight.scale.dtype == torch.bfloat16 else None
        return cls(weight.detach()) if weight.dtype in PER_STEP else None

    def forward(self, x):
        """x (..., D) times the weight (F, D) -> (..., F)."""
        return torch.ops.mini_llm.linear(x, self.weight, self.scale, self.n_outputs)


def packed_experts(x, chosen, gate, up, down):
    """x (N, D), chosen (N, A), `Packed` stacks, or matrices of one expert -> (N, A, D), unweighted."""
    matrices = [packed.weight if packed.weight.ndim == 5 else packed.weight[None] for packed in (gate, up, down)]
    scales = [packed.scale for packed in (gate, up, down) if packed.scale is not None]
    return torch.ops.mini_llm.experts(x, chosen, matrices + scales)


class PackedLinear(nn.Module):
    """An `nn.Linear` or `Int8Linear` with a packed weight."""

    def __init__(self, linear, packed):
        super().__init__()
        self.linear = linear
        self.packed = packed

    def __getattr__(self, name):
        """Other attributes are those of the Linear: weight, bias, in_features, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.linear, name)

    def forward(self, x):
        out = self.packed(x)
        return out if self.linear.bias is None else out + self.linear.bias


class PackedSwiGLU(nn.Module):
    """A SwiGLU with packed weights: to the kernels, a MoE with one expert."""

    def __init__(self, swiglu, matrices):
        super().__init__()
        self.gate_proj = swiglu.gate_proj
        self.up_proj = swiglu.up_proj
        self.down_proj = swiglu.down_proj
        self.matrices = nn.ModuleList(matrices)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        chosen = tokens.new_zeros(len(tokens), 1, dtype=torch.long)
        return packed_experts(tokens, chosen, *self.matrices).view_as(x)


# ---------------------------------------------------------------- which module has a packed form

WEIGHTS = {nn.Linear: attrgetter("weight"), Int8Linear: attrgetter("int8")}  # what a module of exactly this type holds
PACKED_FORMS = {}  # {type of module: function(module, packer) -> its packed form, or None}


def packed_form(form):
    """Decorate a module class by the function(module, packer) that returns its packed form, or None."""

    def register(cls):
        PACKED_FORMS[cls] = form
        return cls

    return register


class Packer:
    """Packs the weights of one model; a weight that two modules share is packed once."""

    def __init__(self):
        self._packed = {}

    def pack(self, weight):
        """Return `Packed.of(weight)`."""
        if id(weight) not in self._packed:
            self._packed[id(weight)] = Packed.of(weight)
        return self._packed[id(weight)]

    def pack_together(self, weights):
        """Return all of `weights` packed; None where there is no kernel for one of them, or their dtypes differ."""
        packed = [self.pack(weight) for weight in weights]
        return None if None in packed or len({one.weight.dtype for one in packed}) > 1 else packed

    def form_of(self, module):
        """Return the packed form of a module, or None. A subclass or a hook may compute anything, so it has none."""
        form = PACKED_FORMS.get(type(module))
        return None if form is None or _has_hooks(module) else form(module, self)


def pack_swiglu(swiglu, packer):
    """Return the `PackedSwiGLU` of a SwiGLU of three plain Linears without biases."""
    linears = swiglu.gate_proj, swiglu.up_proj, swiglu.down_proj
    if any(type(linear) not in WEIGHTS or _has_hooks(linear) or linear.bias is not None for linear in linears):
        return None
    matrices = packer.pack_together([WEIGHTS[type(linear)](linear) for linear in linears])
    return None if matrices is None else PackedSwiGLU(swiglu, matrices)


def _pack_linear(linear, packer):
    packed = packer.pack(WEIGHTS[type(linear)](linear))
    return None if packed is None else PackedLinear(linear, packed)


PACKED_FORMS.update(dict.fromkeys(WEIGHTS, _pack_linear))


def _has_hooks(module):
    return bool(module._forward_hooks or module._forward_pre_hooks)
