"""How much of AdamW's tokens and seconds does our recipe need for the same held-out loss?

    python benchmarks/recipe.py                  both models, three seeds: about half an hour of two CPU cores
    python benchmarks/recipe.py --minutes=9      as many runs as fit; the same command continues

The baseline is AdamW with a cosine to zero, one learning rate for all parameters: the best of a sweep with the first
seed, which continues until worse rates lie on both sides of it. Ours is the model's CPU preset; sizes, sequences and
batch are the preset's for both. A schedule that ends later is another run, so ours is trained again for shares of the
baseline's tokens, until one reaches the baseline's loss and the next smaller one misses it; tokens and seconds are
interpolated between the two. Seconds are those of the training steps, without evaluations. The runs of a seed follow
each other, so that a slow minute of the machine meets both recipes; nothing else should run at the same time.
An interrupted run is not a result. Writes benchmarks/results/recipe.json and docs/recipe.png, and prints the table.
"""

import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import pretrain  # noqa: E402
from engine.runs.metrics import read_metrics  # noqa: E402
from engine.runs.run_folder import git_revision  # noqa: E402
from utils.atomic import write_text  # noqa: E402
from utils.config import opt, parse  # noqa: E402
from utils.errors import UserError, run_script  # noqa: E402
from utils.log import format_seconds, log  # noqa: E402

MODELS = ("mini_llama3", "mini_deepseekv3")
ADAMW = (
    "--optimizer=adamw",
    "--lr_schedule=cosine",
    "--embed_lr_scale=1",
    "--min_lr=0",
    "--warmup_ratio=0.05",
    "--betas=0.9,0.95",
)
LIMIT = 0.65  # of the baseline's tokens, and of its seconds
FIRST, RATIO, LARGEST = 0.5, 0.77, 1.2  # the share of the tokens tried first, the next smaller one, and the last


@dataclass
class Config:
    __doc__ = __doc__
    budget: int = opt(250_000, "training tokens of a baseline run")
    rates: list[float] = opt(
        [0.001, 0.002, 0.004],
        "learning rates of the baseline's sweep, rising; it continues by "
        "their ratio while the best is the first or the last",
    )
    seeds: list[int] = opt([1, 2, 3], "seeds; the sweep takes the first")
    models: list[str] = opt(list(MODELS), "architectures; each needs a preset configs/<model>_cpu.yaml")
    minutes: float = opt(0.0, "start no run that would end after this; 0: no limit")
    data_path: str = opt("output/data/pretrain_train.bin", "training tokens")
    tokenizer_path: str = opt("output/tokenizer", "folder of the tokenizer")
    device: str = opt("auto", "where to train")
    picture: str = opt(str(ROOT / "docs/recipe.png"), "the picture")
    results: str = opt(str(ROOT / "benchmarks/results/recipe.json"), "the figures; runs in it are not repeated")


class OutOfTime(Exception):
    """The next run would end after --minutes."""


class Runs:
    """The runs of results.json; `get` trains those that are missing. All are of one commit and one budget.

    Their names hold rates, seeds and models.
    """

    def __init__(self, config: Config):
        self.config = config
        self.path = Path(config.results)
        self.start = time.monotonic()
        self.about: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "command": "python benchmarks/recipe.py",
            "budget": config.budget,
            "commit": (git_revision() or "").rstrip("+"),
            "machine": machine(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        }
        self.done: dict[str, dict] = {}
        before: dict[str, Any] = {}
        if self.path.is_file():
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            self.done, before = kept["runs"], kept["about"]
        for what in ("budget", "commit", "machine", "torch", "threads") if self.done else ():
            if before.get(what) != self.about[what]:
                raise UserError(
                    f"{self.path} has runs of another {what} ({before.get(what)}, and this is "
                    f"{self.about[what]}): move it away, or give another --results"
                )

    def get(self, model: str, seed: int, tokens: int, flags: Sequence[str] = (), again: bool = False) -> dict:
        """{"loss", "seconds", "tokens", "curve": [[tokens, held-out loss], ...]} of one training.

        again: train it now, even if there is one of the same settings.
        """
        name = " ".join([model, f"seed={seed}", f"tokens={tokens}", *flags, *(["again"] if again else [])])
        if name not in self.done:
            expected = self._expected(model, tokens)
            spent = time.monotonic() - self.start
            if self.config.minutes and spent + expected > 60 * self.config.minutes:
                raise OutOfTime
            log(f"\n--- {name} (about {format_seconds(expected) if expected else 'a minute or two'})")
            began = time.monotonic()
            self.done[name] = {**self._train(model, seed, tokens, flags), "wall": round(time.monotonic() - began, 1)}
            self.write()
        return self.done[name]

    def write(self, results: dict | None = None) -> None:
        """Write the runs so far; `results` only when all runs are done."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"about": self.about, **({"results": results} if results else {}), "runs": self.done}
        write_text(self.path, json.dumps(kept, indent=1) + "\n")

    def progress(self, model: str) -> None:
        """Log how many runs are done, and about how long those of this model and the models after it will take."""
        config, models = self.config, self.config.models
        left = 0.0
        for name in models[models.index(model) :]:
            tokens = config.budget * (len(config.rates) + len(config.seeds) * (1 + FIRST + FIRST * RATIO))
            tokens -= sum(run["tokens"] for key, run in self.done.items() if key.startswith(name + " "))
            left += self._expected(name, max(0, tokens))
        log(f"\n=== {len(self.done)} runs done; about {format_seconds(left)} to go")

    def _expected(self, model: str, tokens: float) -> float:
        """Seconds for so many tokens, by the slowest run of the model, else of any; 0 when unknown."""

        def rates(start: str) -> list[float]:
            return [run["wall"] / run["tokens"] for name, run in self.done.items() if name.startswith(start)]

        return max(rates(model + " ") or rates("") or [0.0]) * tokens

    def _train(self, model: str, seed: int, tokens: int, flags: Sequence[str]) -> dict:
        config = self.config
        with tempfile.TemporaryDirectory() as folder:
            summary = pretrain.main(
                [
                    f"--config={ROOT / 'configs' / model}_cpu.yaml",
                    f"--max_tokens={tokens}",
                    f"--seed={seed}",
                    f"--pretrain_data_path={config.data_path}",
                    f"--tokenizer_path={config.tokenizer_path}",
                    f"--device={config.device}",
                    f"--output_path={folder}",
                    "--sample_interval=0",
                    "--save_interval=0",
                    "--log_interval=50",
                    "--eval_interval=16",
                    "--eval_batches=4",
                    "--eval_final_batches=40",
                    "--skip_checks",
                    *flags,
                ]
            )
            if summary["status"] != "finished":  # an interrupted run would be kept as one of the full budget
                raise KeyboardInterrupt
            records = read_metrics(Path(summary["run"]) / "metrics.jsonl")
        curve = [[record["tokens"], round(record["val_loss"], 4)] for record in records if "val_loss" in record]
        return {
            "loss": summary["val_loss"],
            "seconds": summary["seconds"],
            "tokens": summary["tokens"],
            "curve": curve[:-1],
        }  # the last is over more data: it is "loss"


def machine() -> str:
    """The CPU's name and the number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def compare(runs: Runs, model: str) -> dict:
    """The figures of one model: the sweep, the baseline of each seed, and the shares that ours needs."""
    config = runs.config
    best, sweep = best_rate(
        config.rates, lambda rate: runs.get(model, config.seeds[0], config.budget, (*ADAMW, f"--max_lr={rate}"))["loss"]
    )
    figures: dict[str, Any] = {"sweep": sweep, "best_lr": best, "seeds": {}}

    def run_share(share: float, seed: int) -> dict:
        return runs.get(model, seed, int(share * config.budget))

    for seed in config.seeds:
        runs.progress(model)
        # the sweep's run of the first seed is minutes older than ours
        base = runs.get(model, seed, config.budget, (*ADAMW, f"--max_lr={best}"), again=True)
        ours = bracket(partial(run_share, seed=seed), base["loss"])
        figures["seeds"][seed] = {
            "baseline": base,
            "ours": ours,
            "tokens": needed(ours, base["loss"], "tokens") / base["tokens"],
            "seconds": needed(ours, base["loss"], "seconds") / base["seconds"],
        }
    return figures


def best_rate(rates: list[float], loss_of: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The rate with the lowest loss, and all losses; extends the sweep while the best rate is at its end."""
    losses = {rate: loss_of(rate) for rate in rates}
    while True:
        rates = sorted(losses)
        best = min(losses, key=lambda rate: losses[rate])
        if best not in (rates[0], rates[-1]):
            return best, losses
        rate = rates[0] ** 2 / rates[1] if best == rates[0] else rates[-1] ** 2 / rates[-2]
        losses[float(f"{rate:.3g}")] = loss_of(float(f"{rate:.3g}"))


def bracket(run_of: Callable[[float], dict], loss: float) -> list[dict]:
    """Runs of falling shares, the last the first that misses `loss`; from FIRST down, or up when that one misses."""
    share = FIRST
    ours = [run_of(share)]
    while ours[-1]["loss"] <= loss and share > 0.1:
        share *= RATIO
        ours.append(run_of(share))
    share = FIRST
    while ours[0]["loss"] > loss and share / RATIO < LARGEST:
        share /= RATIO
        ours.insert(0, run_of(share))
    return ours


def needed(ours: list[dict], loss: float, what: str) -> float:
    """Tokens or seconds for `loss`: linear in the loss and the logarithm between the runs on both sides of it."""
    if ours[0]["loss"] > loss:
        return math.inf
    if ours[-1]["loss"] <= loss:
        return ours[-1][what]  # and perhaps less: the smallest share tried still reaches it
    number = next(i for i, run in enumerate(ours) if run["loss"] > loss)
    above, below = ours[number], ours[number - 1]
    part = (loss - below["loss"]) / (above["loss"] - below["loss"])
    return below[what] ** (1 - part) * above[what] ** part


def table(results: dict) -> str:
    """Markdown, one row per model: means over the seeds, and the range of the shares."""
    lines = [
        "| | AdamW + cosine: best rate | its held-out loss | tokens needed | seconds needed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for model, figures in results.items():
        seeds = figures["seeds"].values()
        loss = sum(seed["baseline"]["loss"] for seed in seeds) / len(seeds)
        shares = []
        for what in ("tokens", "seconds"):
            values = [seed[what] for seed in seeds]
            shares.append(f"{sum(values) / len(values):.0%} ({min(values):.0%} to {max(values):.0%})")
        lines.append(f"| `{model}` | {figures['best_lr']} | {loss:.3f} | {shares[0]} | {shares[1]} |")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """One panel per model: held-out loss over tokens for every run; the final ones, over more data, as marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(results), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (model, figures) in zip(panels, results.items()):
        for number, seed in enumerate(figures["seeds"].values()):
            for run, colour, name in [
                (seed["baseline"], "tab:orange", "AdamW + cosine"),
                *((run, "tab:blue", "ours") for run in seed["ours"]),
            ]:
                first = not number and run in (seed["baseline"], seed["ours"][0])
                axes.plot(*zip(*run["curve"]), color=colour, alpha=0.5, linewidth=1, label=name if first else None)
                axes.plot(run["tokens"], run["loss"], "o", color=colour, markersize=4)
            axes.axhline(seed["baseline"]["loss"], color="grey", linewidth=0.6, linestyle="--")
        axes.set(title=model, xlabel="tokens", ylabel="held-out loss (nats per token)", ylim=(None, 7.5))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def main() -> None:
    config = parse(Config)
    runs = Runs(config)
    try:
        results = {model: compare(runs, model) for model in config.models}
    except OutOfTime:
        runs.progress(config.models[0])
        print("out of --minutes: the same command continues")
        return
    means = {
        model: {
            what: sum(seed[what] for seed in figures["seeds"].values()) / len(figures["seeds"])
            for what in ("tokens", "seconds")
        }
        for model, figures in results.items()
    }
    runs.write(
        {
            model: {
                "sweep": figures["sweep"],
                "best_lr": figures["best_lr"],
                "mean": means[model],
                "seeds": {
                    seed: {"loss": of["baseline"]["loss"], "tokens": of["tokens"], "seconds": of["seconds"]}
                    for seed, of in figures["seeds"].items()
                },
            }
            for model, figures in results.items()
        }
    )
    print("\n" + table(results))
    draw(results, Path(config.picture))
    worst = max(share for mean in means.values() for share in mean.values())
    print(
        f"at most {LIMIT:.0%} of the tokens and of the seconds: {'yes' if worst <= LIMIT else 'NO'} "
        f"(the largest mean is {worst:.0%}); figures: {config.results}, picture: {config.picture}"
    )


if __name__ == "__main__":
    run_script(main)
