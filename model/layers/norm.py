"""Normalisation."""

import torch
import torch.nn.functional as F
from torch import nn

from model.kernels import dispatch
from model.kernels.norm import faster_rms_norm


class RMSNorm(nn.Module):
    """Scale each vector to root mean square 1, then by a learned weight (Zhang & Sennrich 2019). (..., D) -> same."""

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


@dispatch(faster_rms_norm)
def rms_norm(x, weight, eps):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
