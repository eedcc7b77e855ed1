"""Published checkpoints: how an architecture's names, config and row order are written there."""

from model.hf.layout import Layout, interleaved_rows

__all__ = ["Layout", "interleaved_rows"]
