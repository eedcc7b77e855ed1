"""Short causal convolutions over time, one filter per channel. J: taps."""

import torch
from torch import nn

from model.kernels import dispatch
from model.kernels.conv import faster_taps
from model.layers.window import recent


class CausalConv(nn.Module):
    """A depthwise causal convolution: y_t = sum_j weight[:, J - 1 - j] * x_{t - j} over the last J = `size` tokens.

    Of another document nothing is read. (B, T, D) -> same. In a state it keeps its last inputs, under `name`.
    """

    scalar_params = ("weight",)  # a filter per channel, no map of the stream

    def __init__(self, dim, size, bias=False):
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(dim, size))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.init_weights()

    def init_weights(self):
        nn.init.uniform_(self.weight, -(self.size**-0.5), self.size**-0.5)  # as usual for convolutions

    def forward(self, x, state=None, layer=None, name="conv", doc_ids=None):
        inputs = recent(state, layer, name, x, self.size - 1)  # (B, J - 1 + T, D)
        docs = None if doc_ids is None else recent(None, None, name, doc_ids, self.size - 1)
        out = sum_of_taps(inputs, self.weight, docs)
        return out if self.bias is None else out + self.bias.to(out.dtype)


@dispatch(faster_taps)
def sum_of_taps(inputs, weight, doc_ids=None):
    """inputs (B, J - 1 + T, D), weight (D, J), doc_ids (B, J - 1 + T) of the inputs -> (B, T, D)."""
    n_taps = weight.shape[1]
    n_tokens = inputs.shape[1] - n_taps + 1
    out = 0
    for j in range(n_taps):  # the oldest first
        tap = inputs[:, j : j + n_tokens] * weight[:, j]
        if doc_ids is not None:
            tap = tap.masked_fill((doc_ids[:, j : j + n_tokens] != doc_ids[:, n_taps - 1 :])[..., None], 0)
        out = out + tap
    return out.to(inputs.dtype)
