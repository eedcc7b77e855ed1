"""Short causal convolutions over time, one filter per channel."""

import torch
from torch import nn

from model.layers.window import recent


class CausalConv(nn.Module):
    """A depthwise causal convolution: y_t = sum_j weight[:, size - 1 - j] * x_{t - j} over the last `size` tokens.

    Of another document nothing is read. (B, T, D) -> same. In a state, under `name`, it keeps its last inputs.
    """

    scalar_params = ("weight",)  # a filter per channel, no map of the stream

    def __init__(self, dim, size, bias=False):
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(dim, size))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.init_weights()

    def init_weights(self):
        nn.init.uniform_(self.weight, -(self.size**-0.5), self.size**-0.5)  # the usual start of a convolution

    def forward(self, x, state=None, layer=None, name="conv", doc_ids=None):
        n_tokens = x.shape[1]
        inputs = recent(state, layer, name, x, self.size - 1)  # (B, size - 1 + T, D)
        docs = None if doc_ids is None else recent(None, None, name, doc_ids, self.size - 1)
        out = 0 if self.bias is None else self.bias
        for j in range(self.size):  # the oldest tap first
            tap = inputs[:, j : j + n_tokens] * self.weight[:, j]
            if docs is not None and j < self.size - 1:
                tap = tap * (docs[:, j : j + n_tokens] == doc_ids)[..., None]
            out = out + tap
        return out
