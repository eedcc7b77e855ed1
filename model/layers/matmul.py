"""Matrix multiplication of activations with activations, or with a part of a weight."""

from model.kernels import dispatch
from model.kernels.matmul import faster_matmul


@dispatch(faster_matmul)
def matmul(a, b):
    """Return a @ b. a (..., N, D), b (..., D, F) -> (..., N, F)."""
    return a @ b
