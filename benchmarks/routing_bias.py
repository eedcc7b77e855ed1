"""Expert load with and without the update of the routing bias, in otherwise equal pretraining runs.

    python benchmarks/routing_bias.py                  the demo's corpus and CPU preset, 2 runs of 500 steps
    python benchmarks/routing_bias.py --steps=50       a quick run

Writes docs/routing_load.png and benchmarks/routing_bias.json, and prints the largest load per layer, as a multiple
of the mean (DeepSeek-V3, section 2.1.2). The learning rate is constant, so that its decay does not stabilize the load.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import pretrain  # noqa: E402
from model import get_model_and_args  # noqa: E402
from utils.config import opt, parse  # noqa: E402
from utils.errors import run_script  # noqa: E402

MODEL = "mini_deepseekv3"
SMOOTH = 20  # steps of the moving mean: one step routes only a few thousand tokens, so its largest load is noisy
LIMIT = 1.5


@dataclass
class Config:
    __doc__ = __doc__
    steps: int = opt(500, "optimizer steps of each run")
    preset: str = opt(str(ROOT / "configs/mini_deepseekv3_cpu.yaml"), "sizes and recipe")
    data_path: str = opt("output/data/pretrain_train.bin", "training tokens", path=True)
    tokenizer_path: str = opt("output/tokenizer", "folder of the tokenizer", path=True)
    device: str = opt("auto", "where to train")
    picture: str = opt(str(ROOT / "docs/routing_load.png"), "picture to write")
    results: str = opt(str(ROOT / "benchmarks/routing_bias.json"), "file to write")


def main() -> None:
    config = parse(Config)
    runs: dict[str, torch.Tensor] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name, speed in (("with the update", None), ("without", 0.0)):
        loads, loss = train(config, speed)
        relative = smooth(loads / loads.mean(dim=-1, keepdim=True))  # (steps, L, E), 1 = the mean load
        largest = relative.max(dim=-1).values  # (steps, L)
        runs[name] = relative
        figures[name] = {
            "largest_load": [round(x, 3) for x in largest[-1].tolist()],
            "smallest_load": [round(x, 3) for x in relative[-1].min(dim=-1).values.tolist()],
            "train_loss": round(loss, 4),
        }
        print(
            f"{name}: largest load per layer {figures[name]['largest_load']}, "
            f"smallest {figures[name]['smallest_load']}, loss {loss:.4f}"
        )
    about = {"steps": config.steps, "smoothed_over": SMOOTH, "preset": Path(config.preset).name, "limit": LIMIT}
    Path(config.results).write_text(json.dumps({**about, "runs": figures}, indent=1) + "\n", encoding="utf-8")
    draw(runs, Path(config.picture))
    worst = max(figures["with the update"]["largest_load"])
    print(
        f"after {config.steps} steps the most loaded expert carries {worst:.2f} times the mean, below {LIMIT}: "
        f"{'yes' if worst < LIMIT else 'NO'}; picture: {config.picture}"
    )


def train(config: Config, bias_update_speed: float | None) -> tuple[torch.Tensor, float]:
    """One run; returns the tokens per expert, (steps, L, E), and the smoothed training loss."""
    Model, _ = get_model_and_args(MODEL)
    loads: list[torch.Tensor] = []
    hook = Model.after_step

    def after_step(self: Any, other_vars: dict[str, torch.Tensor]) -> None:
        loads.append(other_vars["moe/load"].cpu())
        hook(self, other_vars)

    setattr(Model, "after_step", after_step)  # noqa: B010
    try:
        with tempfile.TemporaryDirectory() as folder:
            summary = pretrain.main(
                [
                    f"--config={config.preset}",
                    f"--max_steps={config.steps}",
                    "--lr_schedule=constant",
                    f"--pretrain_data_path={config.data_path}",
                    f"--tokenizer_path={config.tokenizer_path}",
                    f"--device={config.device}",
                    f"--output_path={folder}",
                    "--eval_interval=0",
                    "--sample_interval=0",
                    "--save_interval=0",
                    "--eval_final_batches=1",
                    "--skip_checks",
                    *([] if bias_update_speed is None else [f"--model.bias_update_speed={bias_update_speed}"]),
                ]
            )
    finally:
        setattr(Model, "after_step", hook)  # noqa: B010
    return torch.stack(loads), summary["train_loss"]


def smooth(loads: torch.Tensor) -> torch.Tensor:
    """Moving mean over SMOOTH steps. (steps, L, E) -> (steps, L, E)."""
    total = torch.cat((torch.zeros_like(loads[:1]), loads.cumsum(dim=0)))
    start = (torch.arange(1, len(loads) + 1) - SMOOTH).clamp(min=0)
    end = torch.arange(1, len(loads) + 1)
    return (total[end] - total[start]) / (end - start)[:, None, None]


def draw(runs: dict[str, torch.Tensor], path: Path) -> None:
    """One panel per layer: the load of the most and the least loaded expert over the steps, of both runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_layers = next(iter(runs.values())).shape[1]
    figure = Figure(figsize=(3.6 * n_layers, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, n_layers, sharey=True, squeeze=False)[0]
    for layer, axes in enumerate(panels):
        for (name, relative), colour in zip(runs.items(), ("tab:blue", "tab:orange"), strict=True):
            axes.plot(relative[:, layer].max(dim=-1).values, color=colour, label=name)
            axes.plot(relative[:, layer].min(dim=-1).values, color=colour, linestyle=":")
        axes.axhline(LIMIT, color="grey", linewidth=0.8)
        axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
        axes.set(title=f"MoE layer {layer + 1} of {n_layers}", xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"load / mean load, over {SMOOTH} steps")
    panels[0].legend(title="most (solid), least (dotted)")
    figure.savefig(path)


if __name__ == "__main__":
    run_script(main)
