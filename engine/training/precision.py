"""The compute dtype of training: which one, and the low-precision copies of the matrices that a step computes with."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from model.basemodel import BaseModel
from utils.errors import UserError
from utils.log import log

LEAST_SPEEDUP = 1.5  # of a bf16 matmul: the copies of the weights and the casts of a step take time, too
TRIALS = 5  # matmuls in each dtype
LARGEST = 1024  # tokens and sizes of the timed matmul, which takes milliseconds


def resolve_precision(wanted: str, device: torch.device, model: BaseModel) -> str:
    """auto -> bf16 on a CUDA device that has it, and on a CPU where `bf16_speedup` shows that it pays; else fp32.

    UserError for fp16 elsewhere than on CUDA.
    """
    if wanted == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        speedup = bf16_speedup(model) if device.type == "cpu" and fast_bf16(device) else 0.0
        if speedup >= LEAST_SPEEDUP:
            log(f"--precision=auto: bf16, which this CPU multiplies {speedup:.1f} times as fast as fp32")
        return "bf16" if speedup >= LEAST_SPEEDUP else "fp32"
    if wanted == "fp16" and device.type != "cuda":
        raise UserError(
            f"--precision=fp16 needs CUDA for its loss scaling, and this is {device.type}: use bf16 or fp32"
        )
    return wanted


@cache
def fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply bf16 matrices: without, a CPU takes a hundred times longer."""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("arm_bf16"))
    return device.type == "cuda"


def bf16_speedup(model: BaseModel) -> float:
    """How many times as fast as fp32 the CPU multiplies bf16 at the size of the model's largest matrix; 0 without one.

    The dtypes take turns and the fastest matmul of each counts, so that another program does not decide.
    """
    sizes = [p.shape[-2:] for p in model.param_groups()["matrix"]]
    if not sizes:
        return 0.0
    n_outputs, n_inputs = (min(LARGEST, size) for size in max(sizes, key=math.prod))
    seconds = [
        (matmul_seconds(torch.float32, n_inputs, n_outputs), matmul_seconds(torch.bfloat16, n_inputs, n_outputs))
        for _ in range(TRIALS)
    ]
    fp32, bf16 = map(min, zip(*seconds, strict=True))
    return fp32 / bf16


def matmul_seconds(dtype: torch.dtype, n_inputs: int, n_outputs: int) -> float:
    """Seconds of one matmul of activations (LARGEST, n_inputs) by a weight (n_outputs, n_inputs) on the CPU."""
    x = torch.ones(LARGEST, n_inputs, dtype=dtype)
    weight = torch.ones(n_outputs, n_inputs, dtype=dtype)
    started = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - started


class LowPrecisionCopies:
    """Copies of `params` in `dtype`, made once per step: autocast alone would cast a weight at every use.

    The parameters stay fp32 outside `cast_weights`, and so do their gradients. Embeddings and vectors should be left
    out: an embedding sums the gradients of all uses of a token, which needs fp32.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], dtype: torch.dtype | None) -> None:
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
