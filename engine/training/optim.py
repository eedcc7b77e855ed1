"""The optimizer of a run: Muon for the matrices inside the network, AdamW for the rest, behind one interface."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine.training.ema import EMA
from engine.training.muon import Muon
from model.basemodel import BaseModel


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW whose step can be skipped on the device."""

    def step(self, good: torch.Tensor) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient where `good`, 0-d bool, is true."""
        if good.is_mps:  # its kernels ignore found_inf
            if good.item():
                super().step()
            return
        self.found_inf = 1 - good.float()  # as torch.amp.GradScaler passes it
        super().step()


class CombinedOptimizer:
    """Several optimizers that step as one. Each parameter group has an `lr_scale`, a multiple of the learning rate.

    average: an EMA of the same parameters, which steps after them; or None.
    """

    def __init__(self, *optimizers: AdamW | Muon, average: EMA | None = None) -> None:
        self.optimizers = optimizers
        self.average = average
        self.all: list[AdamW | Muon | EMA] = [*optimizers, average] if average else list(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group to `lr` times its `lr_scale`."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the parameters are their moving averages, when there are any."""
        if self.average is not None:
            self.average.swap()
        try:
            yield
        finally:
            if self.average is not None:
                self.average.swap()

    def step(self, good: torch.Tensor) -> None:
        """Step where `good`, 0-d bool on the parameters' device, is true; else everything stays, to the bit.

        The host does not wait for the device (except on MPS). A first step creates the optimizer state either way.
        """
        for optimizer in self.all:
            optimizer.step(good)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.all]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.all, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def build_optimizer(model: BaseModel, config: Any) -> CombinedOptimizer:
    """The `CombinedOptimizer` for `model.param_groups()`.

    config: optimizer ("muon" or "adamw"), max_lr, betas, weight_decay (of matrices only), embed_lr_scale and
    scalar_lr_scale (learning rates of embeddings and of vectors, as multiples of max_lr), ema (decay, 0: none).
    """
    groups = model.param_groups()
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    grouped = [id(p) for params in groups.values() for p in params]
    assert len(grouped) == len(set(grouped)) and set(grouped) == trainable, (
        f"{type(model).__name__}.param_groups() must hold every trainable parameter exactly once"
    )
    adamw = [
        {"params": groups["embed"], "lr_scale": config.embed_lr_scale, "weight_decay": 0.0},
        {"params": groups["scalar"], "lr_scale": config.scalar_lr_scale, "weight_decay": 0.0},
    ]
    matrix = {"params": groups["matrix"], "lr_scale": 1.0, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        adamw.append(matrix)
    optimizers: list[AdamW | Muon] = [
        AdamW([g for g in adamw if g["params"]], lr=config.max_lr, betas=tuple(config.betas), fused=True)
    ]
    if config.optimizer == "muon" and matrix["params"]:
        optimizers.append(Muon([matrix], lr=config.max_lr))
    average = EMA([p for params in groups.values() for p in params], config.ema) if config.ema else None
    return CombinedOptimizer(*optimizers, average=average)
