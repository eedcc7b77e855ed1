"""Model FLOPs utilisation (MFU): the share of the device's peak that a training uses.

PaLM (Chowdhery et al. 2022, appendix B):

    flops_per_token(T) x tokens per second / (peak of one device x devices)

Padding does not count as tokens. The FLOPs are the model's own, without those of recomputation.
"""

import re
import time
from functools import cache

import torch

from utils.log import log

# Published dense rates of bf16 and fp16 in TFLOPS, by a substring of the device's name; the first match counts.
PUBLISHED = (
    ("GB200", 2500.0), ("B200", 2250.0), ("GH200", 989.4), ("H200", 989.4), ("H100 NVL", 835.5), ("H100 PCIe", 756.0),
    ("H100", 989.4), ("H800 PCIe", 756.0), ("H800", 989.4), ("H20", 148.0), ("A100", 312.0), ("A800", 312.0),
    ("A40", 149.7), ("A30", 165.0), ("A10G", 70.0), ("A10", 125.0), ("RTX A6000", 154.8), ("L40S", 362.0),
    ("L40", 181.0), ("L4", 121.0), ("RTX 5090", 209.5), ("RTX 4090", 165.2), ("RTX 3090", 71.0), ("MI300X", 1307.4),
)  # fmt: skip


class HardwarePeak:
    """`flops`: the peak of one device of this run, in FLOPs per second; `source`: where the figure is from.

    given: in TFLOPS, known from `source`; 0: published for the device at this precision, else measured now.
    """

    def __init__(self, device: torch.device, precision: str, given: float = 0.0, source: str = "--peak_tflops") -> None:
        self.device = device
        self.precision = precision
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        rate = published(name, precision)
        if given:
            self.flops = given * 1e12
            self.source = source
        elif rate is not None:
            self.flops = rate
            self.source = f"{name}, {kind(precision)}, dense, published"
        else:
            self.flops = matmul_rate(device, precision)
            self.source = f"{precision} matmul, measured here at the start"

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.3g} TFLOPS ({self.source})"

    def share(self, flops_per_token: float, tokens_per_s: float, devices: int) -> float:
        """The MFU at `tokens_per_s` over all devices together; at most 1, as a peak that is exceeded is replaced."""
        reached = flops_per_token * tokens_per_s / devices
        if reached > self.flops:
            self._replace(reached)
        return reached / self.flops

    def _replace(self, reached: float) -> None:
        """Measure again; where even that is below `reached`, this rate is the peak. Logs one line."""
        old = str(self)
        measured = measure_matmuls(self.device, self.precision)
        self.flops = max(measured, reached)
        self.source = f"{self.precision} matmul, measured again" if measured > reached else "the most reached here"
        log(f"{reached / 1e12:.3g} TFLOPS per device are above the peak of {old}: 100% MFU is now {self}")


def kind(precision: str) -> str:
    return "tf32" if precision == "fp32" else precision


def published(name: str, precision: str) -> float | None:
    """FLOPs per second by the table, or None; on CUDA fp32 matmuls use TF32, at half the rate of bf16."""
    for part, tflops in PUBLISHED:
        if re.search(rf"\b{part}(?! (Ti|D|Laptop|SUPER)\b)\b", name):
            return tflops * 1e12 / (2 if precision == "fp32" else 1)
    return None


@cache
def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOPs per second of a matmul, measured once per process."""
    return measure_matmuls(device, precision)


def measure_matmuls(device: torch.device, precision: str) -> float:
    """FLOPs per second of the fastest of eight matmuls of two square matrices."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
