"""The token embedding."""

from torch import nn

from model.kernels.precision import compute_dtype


class Embedding(nn.Embedding):
    """Vectors of a table, (...) int64 -> (..., D). Under autocast in its dtype, and so is the residual stream."""

    def forward(self, ids):
        return super().forward(ids).to(compute_dtype(self.weight))
