"""The health of a network while it learns, by the contract alone: norms a layer, updates, how evenly experts are used.

All figures are 0-d tensors for the board; a line goes to the log when something is wrong, once until it is well again.
"""

import math

import torch

from engine.distributed.fsdp import full_tensor
from utils.log import warn

EXPLODES = 10  # a norm is too large at so many times its running mean
STARVES = 0.05  # an expert starves below this part of the mean load,
STARVED_LOOKS = 3  # at so many looks in a row: in a single step it may be chance
SETTLED = 5  # looks before a running mean means anything


class Diagnostics:
    """Looks at single steps: `watch()` before its forward passes, `before_update()`, `after_update()`.

    hooks: whether forward hooks may be set for the step; not on a compiled model, which does not call them.
    """

    def __init__(self, model, hooks: bool = True):
        self.layers = list(getattr(model, "layers", ())) if hooks else []
        self.groups = {name: params for name, params in model.param_groups().items() if params}
        self.parts = {
            f"layer_{i:02d}": [p for p in layer.parameters() if p.requires_grad]
            for i, layer in enumerate(getattr(model, "layers", ()))
        }
        inside = {id(p) for params in self.parts.values() for p in params}
        self.parts |= {name: [p for p in params if id(p) not in inside] for name, params in self.groups.items()}
        self.parts = {name: params for name, params in self.parts.items() if params}
        self.usual: dict[str, tuple[float, int]] = {}  # running mean of a norm, and how many looks it holds
        self.hungry: dict[str, torch.Tensor] = {}  # of each load: for how many looks every expert has starved, (L, E)
        self.ailing: set[str] = set()
        self.hooks, self.figures, self.weights = [], {}, {}

    def watch(self) -> None:
        """Note the root mean square of what every layer gives out (in the last micro-batch) from now on."""
        self.figures = {}
        for i, layer in enumerate(self.layers):

            def note(_layer, _inputs, output, name=f"activation_rms/layer_{i:02d}"):
                output = output[0] if isinstance(output, (tuple, list)) else output
                if isinstance(output, torch.Tensor):
                    self.figures[name] = output.detach().float().square().mean().sqrt()

            self.hooks.append(layer.register_forward_hook(note))

    @torch.no_grad()
    def before_update(self) -> None:
        """Take the norms of the gradients, and a copy of the weights."""
        while self.hooks:
            self.hooks.pop().remove()
        for name, params in self.parts.items():
            self.figures[f"gradient_norm/{name}"] = norm([p.grad for p in params if p.grad is not None])
        self.weights = {name: [p.detach().clone() for p in params] for name, params in self.groups.items()}

    @torch.no_grad()
    def after_update(self, step: int, other_vars: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the figures of the step and warn about what is wrong.

        Loads are the 2-d other_vars whose last name begins with "load": tokens an expert (L, E) got.
        """
        for name, before in self.weights.items():
            moved = norm(torch._foreach_sub([p.detach() for p in self.groups[name]], before))
            self.figures[f"update_to_weight/{name}"] = moved / norm(before).clamp(min=1e-12)
        self.weights = {}
        troubles = {}
        names = [name for name in self.figures if not name.startswith("update")]
        for name, value in zip(names, torch.stack([self.figures[name] for name in names]).tolist()):
            trouble = self._norm_trouble(name, value)
            if trouble:
                troubles[name] = trouble
        for name, load in other_vars.items():
            if load.ndim == 2 and name.split("/")[-1].startswith("load") and load.min() >= 0:
                self._look_at_load(name, load.float(), troubles)
        for key in troubles.keys() - self.ailing:
            warn(f"step {step}: {troubles[key]}")
        self.ailing = set(troubles)
        return self.figures

    def _norm_trouble(self, name, value) -> str | None:
        what = name.replace("_", " ").replace("/", " of ")
        if value == 0 and name.startswith("gradient"):
            return f"the {what} is zero: nothing there learns"
        usual, looks = self.usual.get(name, (value, 0))
        if not math.isfinite(value) or (looks >= SETTLED and value > EXPLODES * usual):
            return f"the {what} is {value:.3g}, and was {usual:.3g} on average: a lower --max_lr may help"
        self.usual[name] = usual + (value - usual) * max(0.1, 1 / (looks + 1)), looks + 1
        return None

    def _look_at_load(self, name, load, troubles) -> None:
        """Entropy of each row's shares over its maximum, and the least load over the mean."""
        share = load / load.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        entropy = torch.special.entr(share).sum(dim=-1) / math.log(max(2, load.shape[1]))
        of_mean = share * load.shape[1]
        self.hungry[name] = (self.hungry.get(name, 0) + 1) * (of_mean < STARVES)
        starved = (self.hungry[name] >= STARVED_LOOKS).tolist()
        for row, (entropy_of_row, shares, starves) in enumerate(zip(entropy, of_mean, starved)):
            short = f"{name.split('/')[-1]}_{row:02d}"
            self.figures[f"routing_entropy/{short}"], self.figures[f"least_load/{short}"] = entropy_of_row, shares.min()
            if any(starves):
                expert = min((e for e, it_does in enumerate(starves) if it_does), key=lambda e: float(shares[e]))
                troubles[f"{name}/{row}"] = (
                    f"expert {expert} of {name}, row {row}, starves: it gets {shares[expert]:.1%} of the mean load"
                )


def norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm over all numbers of all tensors, fp32 0-d."""
    return full_tensor(torch.nn.utils.get_total_norm(tensors)).float()
