"""How much of AdamW's tokens and seconds does our recipe need for the same held-out loss?

    python benchmarks/recipe.py                  both models, three seeds: about 25 minutes of two CPU cores
    python benchmarks/recipe.py --minutes=4      a piece of it: finished runs are kept, and the next call goes on

The baseline is AdamW with a cosine to zero, one learning rate for all parameters, the best of a sweep with the first
seed. Ours is the model's CPU preset as it stands; sizes, rows and batch are the preset's for both. A schedule that ends
later is another run, so ours is trained anew to each share of the baseline's tokens, from the largest down to the first
that misses the baseline's loss; tokens and seconds are interpolated between that one and the last that reaches it.
The runs of a seed follow each other, so that a slow minute of the machine meets both recipes.
Writes benchmarks/recipe.json and docs/recipe.png, and prints the table.
"""

import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import pretrain  # noqa: E402
from engine.files import write_text  # noqa: E402
from engine.metrics import read_metrics  # noqa: E402
from engine.runfolder import git_revision  # noqa: E402
from utils.config import opt, parse  # noqa: E402
from utils.errors import run_script  # noqa: E402

MODELS = ("mini_llama3", "mini_deepseekv3")
ADAMW = ("--optimizer=adamw", "--lr_schedule=cosine", "--embed_lr_scale=1", "--min_lr=0", "--warmup_ratio=0.05")
LIMIT = 0.65  # of the baseline's tokens, and of its seconds


@dataclass
class Config:
    __doc__ = __doc__
    budget: int = opt(250_000, "training tokens of a baseline run")
    rates: list[float] = opt([0.0005, 0.001, 0.002, 0.004], "learning rates of the baseline's sweep")
    shares: list[float] = opt([0.65, 0.5, 0.38, 0.28], "of the budget, that ours is trained for: from the largest down")
    seeds: list[int] = opt([1, 2, 3], "seeds; the sweep takes the first")
    models: list[str] = opt(list(MODELS), "architectures; each needs a preset configs/<model>_cpu.yaml")
    minutes: float = opt(0.0, "start no run that would end later than this; 0: no limit")
    data_path: str = opt("output/data/pretrain_train.bin", "training tokens")
    tokenizer_path: str = opt("output/tokenizer", "folder of the tokenizer")
    device: str = opt("auto", "where to train")
    picture: str = opt(str(ROOT / "docs/recipe.png"), "the picture")
    results: str = opt(str(ROOT / "benchmarks/recipe.json"), "the figures; runs that are in it are not repeated")


class OutOfTime(Exception):
    """The next run would end after --minutes."""


class Runs:
    """The runs of results.json; `get` trains what is not there yet."""

    def __init__(self, config):
        self.config, self.path, self.start = config, Path(config.results), time.monotonic()
        self.done = json.loads(self.path.read_text(encoding="utf-8"))["runs"] if self.path.is_file() else {}

    def get(self, model: str, seed: int, tokens: int, flags=()) -> dict:
        """{"loss", "seconds", "tokens", "curve": [[tokens, held-out loss], ...]} of one training."""
        name = " ".join([model, f"seed={seed}", f"tokens={tokens}", *flags])
        if name not in self.done:
            self._wait(model, tokens)
            began = time.monotonic()
            self.done[name] = {**self._train(model, seed, tokens, flags), "wall": round(time.monotonic() - began, 1)}
            about = {"budget": self.config.budget, "torch": torch.__version__, "cores": os.cpu_count(),
                     "threads": torch.get_num_threads(), "commit": git_revision()}
            write_text(self.path, json.dumps({"about": about, "runs": self.done}, indent=1) + "\n")
        return self.done[name]

    def _wait(self, model, tokens):
        past = [run["wall"] / run["tokens"] for name, run in self.done.items() if name.startswith(model + " ")]
        needed = max(past, default=0.0) * tokens
        if self.config.minutes and time.monotonic() - self.start + needed > 60 * self.config.minutes:
            raise OutOfTime

    def _train(self, model, seed, tokens, flags) -> dict:
        config = self.config
        with tempfile.TemporaryDirectory() as folder:
            summary = pretrain.main([
                f"--config={ROOT / 'configs' / model}_cpu.yaml", f"--max_tokens={tokens}", f"--seed={seed}",
                f"--pretrain_data_path={config.data_path}", f"--tokenizer_path={config.tokenizer_path}",
                f"--device={config.device}", f"--output_path={folder}", "--sample_interval=0", "--save_interval=0",
                "--eval_interval=16", "--eval_batches=4", "--eval_final_batches=40", "--skip_checks", *flags])
            if summary["status"] != "finished":  # a run cut short would be kept, and taken for one of the whole budget
                raise KeyboardInterrupt
            records = read_metrics(Path(summary["run"]) / "metrics.jsonl")
        curve = [[record["tokens"], round(record["val_loss"], 4)] for record in records if "val_loss" in record]
        return {"loss": summary["val_loss"], "seconds": summary["seconds"], "tokens": summary["tokens"],
                "curve": curve[:-1]}  # the last is over more rows: it is "loss"


def compare(runs: Runs, model: str) -> dict:
    """The figures of one model: the sweep, the baseline of each seed, and the shares that ours needs."""
    config = runs.config
    sweep = {rate: runs.get(model, config.seeds[0], config.budget, (*ADAMW, f"--max_lr={rate}"))
             for rate in config.rates}
    best = min(sweep, key=lambda rate: sweep[rate]["loss"])
    figures = {"sweep": {rate: round(run["loss"], 4) for rate, run in sweep.items()}, "best_lr": best, "seeds": {}}
    for seed in config.seeds:
        # the sweep's run of the first seed is minutes older than ours: this is another one (and logs at other steps)
        base = runs.get(model, seed, config.budget, (*ADAMW, f"--max_lr={best}", "--log_interval=50"))
        ours = []
        for share in config.shares:
            ours.append(runs.get(model, seed, int(share * config.budget)))
            if ours[-1]["loss"] > base["loss"]:
                break
        figures["seeds"][seed] = {
            "baseline": base, "ours": ours,
            "tokens": needed(ours, base["loss"], "tokens") / base["tokens"],
            "seconds": needed(ours, base["loss"], "seconds") / base["seconds"]}
    return figures


def needed(ours: list[dict], loss: float, what: str) -> float:
    """Tokens or seconds for `loss`: linear in the loss and the logarithm between the runs on both sides of it."""
    reached = [run for run in ours if run["loss"] <= loss]
    if not reached:
        return math.inf
    if len(reached) == len(ours):
        return reached[-1][what]  # and perhaps less: the smallest share tried still reaches it
    above, below = ours[-1], reached[-1]
    part = (loss - below["loss"]) / (above["loss"] - below["loss"])
    return below[what] ** (1 - part) * above[what] ** part


def table(results: dict) -> str:
    """Markdown, one row a model: means over the seeds, and the range of the shares."""
    lines = ["| | AdamW + cosine: best rate | its held-out loss | tokens needed | seconds needed |",
             "| --- | --- | --- | --- | --- |"]
    for model, figures in results.items():
        seeds = figures["seeds"].values()
        loss = sum(seed["baseline"]["loss"] for seed in seeds) / len(seeds)
        shares = []
        for what in ("tokens", "seconds"):
            values = [seed[what] for seed in seeds]
            shares.append(f"{sum(values) / len(values):.0%} ({min(values):.0%} to {max(values):.0%})")
        lines.append(f"| {model} | {figures['best_lr']} | {loss:.3f} | {shares[0]} | {shares[1]} |")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """A panel a model: the held-out loss over the tokens, of every run; the ends, over more rows, as marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(results), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (model, figures) in zip(panels, results.items()):
        for number, seed in enumerate(figures["seeds"].values()):
            for run, colour, name in [(seed["baseline"], "tab:orange", "AdamW + cosine"),
                                      *((run, "tab:blue", "ours") for run in seed["ours"])]:
                first = not number and run in (seed["baseline"], seed["ours"][0])
                axes.plot(*zip(*run["curve"]), color=colour, alpha=0.5, linewidth=1, label=name if first else None)
                axes.plot(run["tokens"], run["loss"], "o", color=colour, markersize=4)
            axes.axhline(seed["baseline"]["loss"], color="grey", linewidth=0.6, linestyle="--")
        axes.set(title=model, xlabel="tokens", ylabel="held-out loss (nats a token)", ylim=(None, 7.5))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def main():
    config = parse(Config)
    runs = Runs(config)
    try:
        results = {model: compare(runs, model) for model in config.models}
    except OutOfTime:
        print(f"{len(runs.done)} runs are done; the same command goes on")
        return
    print(table(results))
    draw(results, Path(config.picture))
    worst = max(figure for figures in results.values() for what in ("tokens", "seconds")
                for figure in [sum(seed[what] for seed in figures["seeds"].values()) / len(figures["seeds"])])
    print(f"at most {LIMIT:.0%} of the tokens and of the seconds: {'yes' if worst <= LIMIT else 'NO'} "
          f"(the largest mean is {worst:.0%}); picture: {config.picture}")


if __name__ == "__main__":
    run_script(main)
