"""What checkpoints are made of: an optimizer that has a state, and the entries of a manifest."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

Entry = dict[str, Any]  # of a manifest: {"name", "size", "sha256"}


class Optimizer(Protocol):
    """What a checkpoint needs of an optimizer, ours or one of torch.optim."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class TrainOptimizer(Optimizer, Protocol):
    """The optimizer of a training, which holds one or more of torch.optim."""

    @property
    def all(self) -> Sequence[torch.optim.Optimizer]: ...
