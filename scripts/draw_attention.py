"""Draws what the layers of a trained model attend to, a panel per layer: the mean over its heads.

    python scripts/draw_attention.py --run=output/pretrain_my_net --picture=attention.png

Rows are queries, columns keys. The separate first column is what is left of the probability: it goes to learned sinks.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from engine.runs.registry import load_run  # noqa: E402
from model.basemodel import BaseModel  # noqa: E402
from utils.config import opt, parse  # noqa: E402
from utils.errors import UserError, run_script  # noqa: E402

FUNCTIONS = ("attention", "sink_attention")  # of model/layers, as an architecture's file imports them
POEM = (
    "汉皇重色思倾国，御宇多年求不得。杨家有女初长成，养在深闺人未识。天生丽质难自弃，一朝选在君王侧。"
    "回眸一笑百媚生，六宫粉黛无颜色。春寒赐浴华清池，温泉水滑洗凝脂。侍儿扶起娇无力，始是新承恩泽时。"
)
GAP = 0.03  # of the width, between the column of the sinks and the keys


@dataclass
class Config:
    __doc__ = __doc__
    run: str = opt("", "folder of the run", path=True)
    text: str = opt(POEM, "what the model reads")
    picture: str = opt("attention.png", "file to write", path=True)
    columns: int = opt(4, "panels next to each other", ge=1)


def main() -> None:
    config = parse(Config)
    if not Path(config.run, "config.yaml").is_file():
        raise UserError(f"--run={config.run} is no run folder: give one of output/")
    run = load_run(config.run)
    ids = [run.tokenizer.bos_id, *run.tokenizer.encode(config.text)][: run.model.args.max_seq_len]
    layers = probabilities(run.model, torch.tensor([ids]))
    if not layers:
        raise UserError(f"{run.config['model_name']} calls neither {' nor '.join(FUNCTIONS)}: there is nothing to draw")
    draw(layers, Path(config.picture), config.columns)
    for index, layer in enumerate(layers):
        print(f"layer {index}: the sinks take {100 * (1 - layer.sum(dim=-1)).mean():.1f}% of the probability")
    print(config.picture)


@torch.inference_mode()
def probabilities(model: BaseModel, ids: Tensor) -> list[Tensor]:
    """Return the probabilities (H, T, T) of each call of attention. ids (1, T).

    A second call with the unit vectors as values returns them, whatever the form of attention is.
    """
    found: list[Tensor] = []

    def recording(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def record(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
            units = torch.eye(k.shape[1], dtype=v.dtype)[None, :, None].expand(-1, -1, k.shape[2], -1)
            found.append(function(q, k, units, *rest, **options)[0].transpose(0, 1).float())
            return function(q, k, v, *rest, **options)

        return record

    module = sys.modules[type(model).__module__]
    plain = {name: getattr(module, name) for name in FUNCTIONS if hasattr(module, name)}
    try:
        for name, function in plain.items():
            setattr(module, name, recording(function))
        model(ids)
    finally:
        for name, function in plain.items():
            setattr(module, name, function)
    return found


def draw(layers: list[Tensor], path: Path, columns: int) -> None:
    """Write the picture: a panel per layer, darker = more; the square root shows small probabilities."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(layers))
    lines = -(-len(layers) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.5 * lines), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in panels[len(layers) :]:
        axes.set_axis_off()
    for index, (axes, layer) in enumerate(zip(panels, layers, strict=False)):
        keys = layer.mean(dim=0)  # (T, S)
        sink = (1 - keys.sum(dim=-1)).clamp(min=0)
        axes.set_title(f"layer {index}: sinks {100 * sink.mean():.0f}%", fontsize=8)
        axes.set_axis_off()
        width = max(0.04, 1 / len(keys))
        for values, box in ((sink[:, None], (0, 0, width, 1)), (keys, (width + GAP, 0, 1 - width - GAP, 1))):
            part = axes.inset_axes(box, xticks=[], yticks=[])
            part.imshow(values.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    figure.savefig(path)


if __name__ == "__main__":
    run_script(main)
