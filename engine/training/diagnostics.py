"""Diagnostics of a network during training, by the contract alone: norms per layer, update sizes, expert load.

All figures are 0-d tensors for TensorBoard. Each problem is logged once, until it is over.
"""

import math
from typing import Any

import torch

from engine.distributed.fsdp import full_tensor
from model.basemodel import BaseModel, is_expert_load
from utils.log import warn

EXPLODES = 10  # a norm explodes above this multiple of its running mean
UNDERUSED = 0.05  # an expert is underused below this share of the mean load
UNDERUSED_CHECKS = 3  # in this many checks in a row: in a single step it may be chance
SETTLED = 5  # checks before a running mean is used


class Diagnostics:
    """Checks single steps: `watch()` before the forward passes, `before_update()`, `after_update()`.

    hooks: whether to use forward hooks; not on a compiled model, which does not call them.
    """

    def __init__(self, model: BaseModel, hooks: bool = True) -> None:
        layers = list(getattr(model, "layers", ()))
        self.layers = layers if hooks else []
        self.groups = {name: params for name, params in model.param_groups().items() if params}
        self.parts = {
            f"layer_{i:02d}": [p for p in layer.parameters() if p.requires_grad] for i, layer in enumerate(layers)
        }
        inside = {id(p) for params in self.parts.values() for p in params}
        self.parts |= {name: [p for p in params if id(p) not in inside] for name, params in self.groups.items()}
        self.parts = {name: params for name, params in self.parts.items() if params}
        self.running: dict[str, tuple[float, int]] = {}  # running mean of a norm, and the number of checks in it
        self.underused: dict[
            str, torch.Tensor
        ] = {}  # per load: checks in a row in which an expert was underused, (L, E)
        self.warned: set[str] = set()  # problems that are not over
        self.hooks: list[Any] = []
        self.figures: dict[str, torch.Tensor] = {}
        self.weights: dict[str, list[torch.Tensor]] = {}

    def watch(self) -> None:
        """From now on note the root mean square of every layer's output (of the last micro-batch)."""
        self.figures = {}
        for i, layer in enumerate(self.layers):

            def note(_layer: Any, _inputs: Any, output: Any, name: str = f"activation_rms/layer_{i:02d}") -> None:
                output = output[0] if isinstance(output, (tuple, list)) else output
                if isinstance(output, torch.Tensor):
                    self.figures[name] = output.detach().float().square().mean().sqrt()

            self.hooks.append(layer.register_forward_hook(note))

    @torch.no_grad()
    def before_update(self) -> None:
        """Take the gradient norms, and a copy of the weights."""
        while self.hooks:
            self.hooks.pop().remove()
        for name, params in self.parts.items():
            self.figures[f"gradient_norm/{name}"] = norm([p.grad for p in params if p.grad is not None])
        self.weights = {name: [p.detach().clone() for p in params] for name, params in self.groups.items()}

    @torch.no_grad()
    def after_update(self, step: int, other_vars: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the figures of the step, and warn about problems.

        Expert loads are the 2-d other_vars whose last name begins with "load": tokens per expert, (L, E).
        """
        for name, before in self.weights.items():
            moved = norm(list(torch._foreach_sub([p.detach() for p in self.groups[name]], before)))
            self.figures[f"update_to_weight/{name}"] = moved / norm(before).clamp(min=1e-12)
        self.weights = {}
        problems = {}
        names = [name for name in self.figures if not name.startswith("update")]
        for name, value in zip(names, torch.stack([self.figures[name] for name in names]).tolist()):
            problem = self._norm_problem(name, value)
            if problem:
                problems[name] = problem
        for name, load in other_vars.items():
            if is_expert_load(name, load) and load.min() >= 0:
                problems |= self._load_problems(name, load.float())
        for key in problems.keys() - self.warned:
            warn(f"step {step}: {problems[key]}")
        self.warned = set(problems)
        return self.figures

    def _norm_problem(self, name: str, value: float) -> str | None:
        what = name.replace("_", " ").replace("/", " of ")
        if value == 0 and name.startswith("gradient"):
            return f"the {what} is zero: nothing there learns"
        mean, checks = self.running.get(name, (value, 0))
        if not math.isfinite(value) or (checks >= SETTLED and value > EXPLODES * mean):
            return f"the {what} is {value:.3g}, and was {mean:.3g} on average: a lower --max_lr may help"
        self.running[name] = mean + (value - mean) * max(0.1, 1 / (checks + 1)), checks + 1
        return None

    def _load_problems(self, name: str, load: torch.Tensor) -> dict[str, str]:
        """Note per layer the entropy of the load over its maximum, and the least load over the mean; (L, E)."""
        share = load / load.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        entropy = torch.special.entr(share).sum(dim=-1) / math.log(max(2, load.shape[1]))
        of_mean = share * load.shape[1]
        self.underused[name] = (self.underused.get(name, 0) + 1) * (of_mean < UNDERUSED)
        underused = (self.underused[name] >= UNDERUSED_CHECKS).tolist()
        problems = {}
        for layer, (layer_entropy, loads, flags) in enumerate(zip(entropy, of_mean, underused)):
            short = f"{name.split('/')[-1]}_{layer:02d}"
            self.figures[f"routing_entropy/{short}"] = layer_entropy
            self.figures[f"least_load/{short}"] = loads.min()
            if any(flags):
                expert = min((e for e, flag in enumerate(flags) if flag), key=lambda e: float(loads[e]))
                problems[f"{name}/{layer}"] = (
                    f"expert {expert} of {name}, MoE layer {layer}, is underused: it gets {loads[expert]:.1%} of the "
                    "mean load"
                )
        return problems


def norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm over all elements of all tensors, fp32 0-d."""
    return full_tensor(torch.nn.utils.get_total_norm(tensors)).float()
