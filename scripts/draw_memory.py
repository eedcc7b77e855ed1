"""Draws what a matrix memory returns under each rule of writing: python scripts/draw_memory.py PICTURE.png

A few keys are written again and again, each time with another value, and eight queries after another ask for the same
key. A row is a query, a column a write, the color the weight that the written value has in the answer: right is 1 at
the last write under the key that is asked for, and 0 elsewhere.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from model.layers.recurrence import delta_rule  # noqa: E402
from utils.errors import UserError, run_script  # noqa: E402

KEYS, KEY_DIM, TOKENS, QUERIES = 5, 16, 40, 8
FADE = 0.93  # what is left of the memory after a token


def written_keys() -> tuple[Tensor, Tensor]:
    """Return the keys (KEYS, KEY_DIM), not quite orthogonal, and which of them each token writes (TOKENS,)."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.nn.functional.normalize(torch.randn(KEYS, KEY_DIM, generator=generator), dim=-1)
    return keys, torch.randint(KEYS, (TOKENS,), generator=generator)


def asked_keys() -> Tensor:
    """Return which key each query asks for (TOKENS,)."""
    return torch.arange(TOKENS) // QUERIES % KEYS


def weights(fade: float, replace: bool) -> Tensor:
    """Return the weights (TOKENS, TOKENS) of all written values in the answer to each query."""
    keys, written = written_keys()
    q, k = (keys[index][None, :, None] for index in (asked_keys(), written))  # (1, T, 1, K)
    values = torch.eye(TOKENS)[None, :, None]  # an answer holds the weights themselves
    decay = torch.full((1, TOKENS, 1), fade).log()
    return delta_rule(q, k, values, decay, torch.ones_like(decay) if replace else None)[0][0, :, 0]


def right_weights() -> Tensor:
    """Return the weights of a memory that keeps the last value of every key."""
    past = (asked_keys()[:, None] == written_keys()[1]).tril()
    return (past & (past.flip(1).cumsum(dim=1).flip(1) == 1)).float()


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("give the file to write: python scripts/draw_memory.py PICTURE.png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "right": right_weights(),
        "added": weights(1.0, False),
        "faded, added": weights(FADE, False),
        "replaced": weights(1.0, True),
        "faded, replaced": weights(FADE, True),
    }
    figure = Figure(figsize=(10, 2.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, shown) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        error = (shown - right_weights()).square().sum(dim=1).mean().sqrt()
        axes.set_title(f"{title}: error {error:.2f}", fontsize=9)
        axes.imshow(shown, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_axis_off()
    figure.savefig(sys.argv[1])
    print(sys.argv[1])


if __name__ == "__main__":
    run_script(main)
