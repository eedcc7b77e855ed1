"""Draws what a matrix memory returns under each rule of writing: python scripts/draw_memory.py PICTURE.png

A few keys are written again and again, each time with another value. Each query asks for the key of its own token. A
row is a query, a column a write, the color the weight that the written value has in the answer: right is 1 at the
diagonal, the last write under this key, and 0 elsewhere.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from model.layers.recurrence import delta_rule  # noqa: E402
from utils.errors import UserError, run_script  # noqa: E402

KEYS, KEY_DIM, TOKENS = 5, 8, 40
FADE = 0.93  # what is left of the memory after a token


def weights(fade: float, replace: bool) -> Tensor:
    """Return the weights (T, T) of all written values in the answer to each query."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.nn.functional.normalize(torch.randn(KEYS, KEY_DIM, generator=generator), dim=-1)
    k = keys[torch.randint(KEYS, (TOKENS,), generator=generator)][None, :, None]  # (1, T, 1, K)
    values = torch.eye(TOKENS)[None, :, None]  # an answer holds the weights themselves
    decay = torch.full((1, TOKENS, 1), fade).log()
    return delta_rule(k, k, values, decay, torch.ones_like(decay) if replace else None)[0][0, :, 0]


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("give the file to write: python scripts/draw_memory.py PICTURE.png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "added": weights(1.0, False),
        "faded, added": weights(FADE, False),
        "replaced": weights(1.0, True),
        "faded, replaced": weights(FADE, True),
    }
    figure = Figure(figsize=(9, 2.7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, shown) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        error = (shown - torch.eye(TOKENS)).square().sum(dim=1).mean().sqrt()
        axes.set_title(f"{title}: error {error:.2f}", fontsize=9)
        axes.imshow(shown, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_axis_off()
    figure.savefig(sys.argv[1])
    print(sys.argv[1])


if __name__ == "__main__":
    run_script(main)
