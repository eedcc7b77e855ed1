"""The feed-forward layer."""

import torch.nn.functional as F
from torch import nn

from model.kernels.packed import pack_swiglu, packed_form


@packed_form(pack_swiglu)
class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020). (..., D) -> (..., D)."""

    def __init__(self, dim, inter_dim):
        super().__init__()
        self.gate_proj = nn.Linear(dim, inter_dim, bias=False)
        self.up_proj = nn.Linear(dim, inter_dim, bias=False)
        self.down_proj = nn.Linear(inter_dim, dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
