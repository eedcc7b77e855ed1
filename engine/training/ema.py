"""An exponential moving average (EMA) of the weights, saved and loaded as an optimizer."""

from typing import Any

import torch

from engine.distributed.fsdp import local
from engine.training.conditional import copy_if


class EMA(torch.optim.Optimizer):
    """Exponential moving average of the parameters; it steps and is saved as an optimizer, but moves no parameter.

    The decay of update n (from 1) is min(decay, n / (n + 9)), so that the initial weights are soon forgotten.
    """

    def __init__(self, params: Any, decay: float) -> None:
        super().__init__(params, {"decay": decay, "capturable": True})  # PyTorch then loads `step` onto the device

    @torch.no_grad()
    def step(self, good: torch.Tensor) -> None:  # type: ignore[override]
        """Move the average of every parameter towards its current value where `good`, 0-d bool, is true."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["step"] = torch.zeros((), device=param.device)
                    state["average"] = param.clone()
                # checkpoints of an earlier version load `step` onto the CPU
                state["step"] = state["step"].to(param.device).add_(good)
                count = state["step"]
                # the first update is the first value itself
                decay = (count / (count + 9)).clamp(max=group["decay"]).masked_fill(count == 1, 0)
                average = local(state["average"])
                copy_if(good, average.lerp(local(param), 1 - decay), average)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their averages; a second call restores both, to the bit."""
        for param, state in self.state.items():
            value = param.clone()
            param.copy_(state["average"])
            state["average"].copy_(value)
