"""Published checkpoints: how an architecture's names, config and tensors are written there."""

from model.hf.config_keys import Key
from model.hf.layout import Layout, Variants
from model.hf.tensors import Join, MinusOne, Rows, Shape, Transposed, alternating_blocks, interleaved_rows

__all__ = [
    "Join", "Key", "Layout", "MinusOne", "Rows", "Shape", "Transposed", "Variants", "alternating_blocks",
    "interleaved_rows",
]  # fmt: skip
