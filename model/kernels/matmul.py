"""Batched matmuls with few rows, as a decode step has them."""

import torch

FEW_ROWS = 16  # up to here the sum is faster


def faster_matmul(plain, a, b):
    """Compiled for a CPU, a few rows of `a`: a sum, which the compiler fuses with the operations around it.

    The library's matmul of matrices this small takes several times as long.
    """
    if a.shape[-2] <= FEW_ROWS and a.device.type == "cpu" and torch.compiler.is_compiling():
        return few_rows_matmul(a, b)
    return plain(a, b)


def few_rows_matmul(a, b):
    """a (..., N, D) @ b (..., D, F) in fp32 inside -> (..., N, F) of the dtype of `a`."""
    return (a[..., None].float() * b.unsqueeze(-3)).sum(dim=-2).to(a.dtype)
