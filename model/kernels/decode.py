"""The C++ kernels of a decode step on the CPU (decode.cpp): when they are used, and their operators.

A decode step multiplies few tokens by large weights. The kernels have no gradient.
"""

import torch

from model import kernels
from model.kernels.build import load_extension

PRECISIONS = ("fp32", "bf16", "int8")  # of weights; there is no kernel for fp16

_loaded = False
_attention_pays = False  # asked when the kernels are loaded: a compiled graph cannot ask


def kernels_pay(precision):
    """Whether all kernels beat PyTorch's operators on this CPU for weights of this precision.

    Measured: they do with AVX512-BF16, whose instructions multiply bf16 and int8 weights. Without it those for linear
    layers and attention are slower (docs/LOG.md); fp32 has been measured on no other CPU with it.
    """
    return precision in PRECISIONS and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def experts_pay(precision):
    """Whether the kernel for experts alone does: it reads the chosen matrices of bf16 or int8, and copies none.

    Measured with AVX2 (docs/LOG.md); with fp32 weights it does not.
    """
    return kernels_pay(precision) or precision in ("bf16", "int8") and bool(torch.cpu.get_capabilities().get("avx2"))


def use_kernels(precision):
    """Whether a decode step on the CPU is to use the kernels, at least for experts: MINI_LLM_KERNELS=0 forbids it."""
    return kernels.ENABLED and experts_pay(precision)


def load():
    """Register the operators of decode.cpp as torch.ops.mini_llm. Raises `ModelError` where they cannot be built."""
    global _loaded, _attention_pays
    _attention_pays = kernels_pay("bf16")
    if _loaded:
        return
    load_extension()
    for fake in _linear, _experts, _expert_linear, _attend, _visible:
        torch.library.register_fake(f"mini_llm::{fake.__name__[1:]}", fake)
    _loaded = True


def in_use(*tensors):
    """Whether the kernels of attention replace PyTorch's operators here.

    They are loaded and pay, and this is a compiled graph on the CPU without grad.
    """
    return (
        _loaded
        and _attention_pays
        and torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and all(x.device.type == "cpu" for x in tensors)
    )


def can_attend(*tensors):
    """Whether `one_query_attention` replaces PyTorch's attention of these."""
    dtype = tensors[0].dtype
    return in_use(*tensors) and dtype in (torch.float32, torch.bfloat16) and all(x.dtype == dtype for x in tensors)


def one_query_attention(q, k, v, mask, scale):
    """Attention of one query per sequence; keys after the last visible one are not read.

    q (B, 1, H, K), k (B, S, G, K), v (B, S, G, Kv), mask bool (B | 1, 1, 1, S) -> (B, 1, H, Kv). Each sequence must see
    at least one key.
    """
    return torch.ops.mini_llm.attend(q, k, v, mask, scale)


def visible_keys(positions, n_keys):
    """Return bool (B, 1, T, S): queries at `positions` (B, T) int64 see the keys up to there.

    One operator: the compiler would fuse the comparison into every layer.
    """
    return torch.ops.mini_llm.visible(positions, n_keys)


def _linear(x, weight, scale, n_outputs):
    return x.new_empty(*x.shape[:-1], n_outputs)


def _experts(x, chosen, held):
    return x.new_empty(*chosen.shape, x.shape[-1])


def _expert_linear(x, chosen, stack, scale, n_outputs):
    return x.new_empty(x.shape[0], n_outputs)


def _attend(q, k, v, mask, scale):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _visible(positions, n_keys):
    return positions.new_empty(positions.shape[0], 1, positions.shape[1], n_keys, dtype=torch.bool)
