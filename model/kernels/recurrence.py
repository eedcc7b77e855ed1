"""The chunks of a linear recurrence with less memory in training."""

import torch
from torch.utils.checkpoint import checkpoint


def faster_chunk(plain, *inputs):
    """In training, keep the inputs of a chunk alone: its matrices are computed again in the backward pass."""
    needs_grad = any(x is not None and x.requires_grad for x in inputs)
    if torch.is_grad_enabled() and needs_grad and not torch.compiler.is_compiling():
        return checkpoint(plain, *inputs, use_reentrant=False, preserve_rng_state=False)
    return plain(*inputs)
