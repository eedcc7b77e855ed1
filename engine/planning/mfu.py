"""What the device could do at best, and the share of it that a training makes use of: its MFU.

MFU, the model FLOPs utilisation (PaLM, Chowdhery et al. 2022, appendix B):

    flops_per_token(T) x tokens a second / (peak of one device x devices)

Tokens are those that are not padding. The FLOPs are the model's own, without what recomputation adds.
"""

import re
import time
from functools import cache

import torch

# Published dense rates of bf16 and fp16 in TFLOPS, found by a part of the device's name; the first that fits counts.
PUBLISHED = (
    ("GB200", 2500.0), ("B200", 2250.0), ("GH200", 989.4), ("H200", 989.4), ("H100 NVL", 835.5), ("H100 PCIe", 756.0),
    ("H100", 989.4), ("H800 PCIe", 756.0), ("H800", 989.4), ("H20", 148.0), ("A100", 312.0), ("A800", 312.0),
    ("A40", 149.7), ("A30", 165.0), ("A10G", 70.0), ("A10", 125.0), ("RTX A6000", 154.8), ("L40S", 362.0),
    ("L40", 181.0), ("L4", 121.0), ("RTX 5090", 209.5), ("RTX 4090", 165.2), ("RTX 3090", 71.0), ("MI300X", 1307.4),
)  # fmt: skip


class HardwarePeak:
    """`flops`: the most FLOPs a second that one device of this run can do; `source`: where the figure is from.

    given: in TFLOPS, by the user; 0: published for the device at this precision, else measured here and now.
    """

    def __init__(self, device: torch.device, precision: str, given: float = 0.0):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        if given:
            self.flops, self.source = given * 1e12, "--peak_tflops"
        elif published(name, precision):
            self.flops, self.source = published(name, precision), f"{name}, {kind(precision)}, dense, published"
        else:
            self.flops, self.source = matmul_rate(device, precision), f"{precision} matmul, measured here at the start"

    def __str__(self):
        return f"{self.flops / 1e12:.3g} TFLOPS ({self.source})"

    def share(self, flops_per_token: float, tokens_per_s: float, devices: int) -> float:
        """The MFU at so many tokens a second on all devices together."""
        return flops_per_token * tokens_per_s / (self.flops * devices)


def kind(precision: str) -> str:
    return "tf32" if precision == "fp32" else precision


def published(name: str, precision: str) -> float | None:
    """FLOPs a second by the table, or None; fp32 multiplies as TF32 on CUDA, at half the rate of bf16."""
    for part, tflops in PUBLISHED:
        if re.search(rf"\b{part}(?! (Ti|D|Laptop|SUPER)\b)\b", name):
            return tflops * 1e12 / (2 if precision == "fp32" else 1)
    return None


@cache
def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOPs a second of the fastest of some products of two square matrices."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 1024 if device.type == "cpu" else 8192
    matrix, best = torch.ones(size, size, dtype=dtype, device=device), float("inf")
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
