"""The compute dtype of training: which one, and the low-precision copies of the matrices that a step computes with."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from utils.errors import UserError


def resolve_precision(wanted: str, device: torch.device) -> str:
    """auto -> bf16 on a CUDA device that has it, else fp32; UserError for fp16 elsewhere than on CUDA."""
    if wanted == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if wanted == "fp16" and device.type != "cuda":
        raise UserError(
            f"--precision=fp16 needs CUDA for its loss scaling, and this is {device.type}: use bf16 or fp32"
        )
    return wanted


class LowPrecisionCopies:
    """Copies of `params` in `dtype`, made once per step: autocast alone would cast a weight at every use.

    The parameters stay fp32 outside `cast_weights`, and so do their gradients. Embeddings and vectors should be left
    out: an embedding sums the gradients of all uses of a token, which needs fp32.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], dtype: torch.dtype | None):
        self.params = list(params)
        self.copies = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in self.params]
        self.sums: list[torch.Tensor | None] = [None] * len(self.params)

    @contextmanager
    def cast_weights(self) -> Iterator[None]:
        """A context in which the parameters are their copies; call `collect` after each backward pass in it."""
        if not self.params:
            yield
            return
        full = [p.data for p in self.params]
        torch._foreach_copy_(self.copies, full)
        self.sums = [p.grad for p in self.params]
        try:
            for p, copy in zip(self.params, self.copies):
                p.grad = None
                p.data = copy
            yield
        finally:
            for p, data, total in zip(self.params, full, self.sums):
                p.grad = None
                p.data = data
                p.grad = total

    @contextmanager
    def explain_dtype_errors(self) -> Iterator[None]:
        """A context in which a low-precision matrix that meets fp32 activations, where autocast is off, is a UserError.

        Autocast alone leaves fp32 weights fp32 there, so the author of a model would not expect the mismatch.
        """
        try:
            yield
        except RuntimeError as error:
            if not self.params or "same dtype" not in str(error):
                raise
            raise UserError(
                f"forward fails because matrices are {self.copies[0].dtype} in training ({error}): where "
                "it computes in fp32 it must use weight.float(), or param_groups must count that weight "
                "as scalar; or use --precision=fp32"
            ) from error

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of one backward pass to the fp32 sums."""
        for i, p in enumerate(self.params):
            if p.grad is not None:
                total = self.sums[i]
                self.sums[i] = p.grad.float() if total is None else total.add_(p.grad)
                p.grad = None
