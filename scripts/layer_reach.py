"""Draws what each layer of an architecture reads: python scripts/layer_reach.py MODEL PICTURE.png

A row is a query, a column a key; the color is how strongly the layer's output at the one depends on its input at the
other, besides the residual path: the norm of a gradient, relative to the panel's largest. White: not at all. The model
is the tiny one of the checks, with weights of unit gain, so that windows, taps and chunks are a few tokens long.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checks import ModelUnderTest  # noqa: E402
from model import BaseModel  # noqa: E402
from utils.errors import UserError, run_script  # noqa: E402

TOKENS = 40
PER_ROW = 3
LEAST = 1e-3  # of a panel's largest value: what is drawn as the weakest dependence


def layer_reach(model: BaseModel, ids: Tensor) -> list[Tensor]:
    """Return the norms (T, S) of d output[t] / d input[s] of each layer, for ids (T,).

    The gradient is that of a random direction of the output.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        out = output[0] if isinstance(output, tuple) else output
        seen.append((inputs[0], out - inputs[0]))

    layers = list(model.layers.children())  # type: ignore[union-attr]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    model(ids.expand(len(ids), -1))  # sequence t is asked for the gradient of its token t
    for handle in handles:
        handle.remove()
    generator, every, reach = torch.Generator().manual_seed(0), torch.arange(len(ids)), []
    for x, out in seen:
        at = out[every, every]
        scalar = (at * torch.randn(at.shape, generator=generator)).sum()
        reach.append(torch.autograd.grad(scalar, x, retain_graph=True)[0].flatten(2).norm(dim=-1))
    return reach


def kind_of(layer: nn.Module) -> str:
    """Return the name of what a layer mixes tokens by: the `kind` of a part, or its first part that is no norm."""
    kinds = [kind for part in layer.children() if isinstance(kind := getattr(part, "kind", None), str)]
    names = kinds or [type(part).__name__ for part in layer.children()]
    return next((name for name in names if "Norm" not in name), type(layer).__name__)


def draw(model: BaseModel, reach: list[Tensor], path: Path) -> None:
    """Write the picture: one panel per layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_rows = -(-len(reach) // PER_ROW)
    figure = Figure(figsize=(3 * PER_ROW, 3 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (layer, values) in enumerate(zip(model.layers, reach, strict=True)):  # type: ignore[arg-type]
        axes = figure.add_subplot(n_rows, PER_ROW, i + 1)
        shown = (values / values.max()).masked_fill(values == 0, float("nan")).clamp(min=LEAST).log10()
        axes.imshow(shown.numpy(), cmap="viridis_r", vmin=-3, vmax=0)
        axes.set_title(f"layer {i}: {kind_of(layer)}", fontsize=9)
        axes.tick_params(labelsize=7)
    figure.supxlabel("input at token", fontsize=8)
    figure.supylabel("output at token", fontsize=8)
    figure.savefig(path, dpi=72)


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("name an architecture and a file: python scripts/layer_reach.py MODEL PICTURE.png")
    tested = ModelUnderTest(sys.argv[1])
    model = tested.build(max_seq_len=TOKENS)
    draw(model, layer_reach(model, tested.tokens(1, TOKENS)[0]), Path(sys.argv[2]))


if __name__ == "__main__":
    run_script(main)
