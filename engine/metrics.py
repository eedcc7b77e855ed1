"""Where a run's numbers go: metrics.jsonl, TensorBoard, the loss curve. other_vars are logged by shape, not by name."""

import json
import sys
from pathlib import Path

import torch

from utils.log import format_count


class RunLog:
    """Writes the numbers of a run (main process only; with folder None every method does nothing).

    After a resume at step s the records beyond s are dropped, so the file reads as if the run had never stopped.
    """

    def __init__(self, folder: Path | None, start_step: int):
        self.folder = folder
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one process needs it

        self.path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(self.path) if record["step"] <= start_step]
        self.file = open(self.path, "w", encoding="utf-8")
        self.file.writelines(json.dumps(record) + "\n" for record in kept)
        self.file.flush()
        self.board = SummaryWriter(str(folder / "logs"), purge_step=start_step + 1 if start_step else None)

    def step(self, record: dict, other_vars: dict[str, torch.Tensor]) -> None:
        """One training step: record holds step, tokens, loss, lr, grad_norm, tokens_per_s."""
        if self.folder is None:
            return
        self._write(record)
        for name in ("loss", "lr", "grad_norm", "tokens_per_s"):
            self.board.add_scalar(f"train/{name}", record[name], record["step"])
        for name, value in other_vars.items():
            self._add(name, value.detach().float().cpu(), record["step"])

    def evaluation(self, record: dict) -> None:
        """One held-out evaluation: record holds step, tokens, val_loss and perhaps val_bpc."""
        if self.folder is None:
            return
        self._write(record)
        for name in ("val_loss", "val_bpc"):
            if record.get(name) is not None:
                self.board.add_scalar(name.replace("_", "/"), record[name], record["step"])

    def text(self, name: str, value: str, step: int) -> None:
        if self.folder is not None:
            self.board.add_text(name, value, step)

    def close(self) -> None:
        """Flush everything and draw loss_curve.png."""
        if self.folder is None:
            return
        self.file.close()
        self.board.close()
        draw_curve(self.path, self.folder / "loss_curve.png")

    def _write(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def _add(self, name: str, value: torch.Tensor, step: int) -> None:
        if value.ndim == 0:
            self.board.add_scalar(name, value.item(), step)
        elif value.ndim <= 2 and value.numel() and bool(torch.isfinite(value).all()):  # no histogram can hold a NaN
            rows = value if value.ndim == 2 else value[None]
            for i, row in enumerate(rows):
                self.board.add_histogram(f"{name}/{i:02d}" if value.ndim == 2 else name, row, step)


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line cut off by a crash is left out."""
    records = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def draw_curve(metrics: Path, picture: Path) -> None:
    """Training loss, its moving average and the held-out loss over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    held_out = [(r["step"], r["val_loss"], r.get("val_targets")) for r in records if r.get("val_loss") is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)")
    if train:
        steps, losses = zip(*train)
        half = len(losses) // 20
        windows = (losses[max(0, i - half) : i + half + 1] for i in range(len(losses)))  # around i: it does not lag
        axes.plot(steps, losses, color="tab:blue", alpha=0.25)
        axes.plot(steps, [sum(window) / len(window) for window in windows], color="tab:blue", label="training")
    if held_out:
        # The evaluation at the end may read more held-out data than those before it: another set, so another mark.
        same = [(step, loss) for step, loss, targets in held_out if targets == held_out[0][2]]
        other = [(step, loss) for step, loss, targets in held_out if targets != held_out[0][2]]
        axes.plot(*zip(*same), "o-", color="tab:orange", markersize=3, label="held out")
        if other:
            axes.plot(*zip(*other), "D", color="tab:red", markersize=5, label="held out, at the end over more of it")
    if train or held_out:
        axes.legend()
    axes.grid(alpha=0.3)
    axes.set_title(metrics.parent.name)
    figure.savefig(picture)


def memory_text(device: torch.device) -> str:
    """Peak memory so far: of the GPU, else of the process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB"
    if sys.platform == "win32":
        return "? GB"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GB"


def log_text(record: dict, smooth_loss: float, val_loss: float | None, skipped: int, device: torch.device) -> str:
    """The figures of a log line."""
    parts = [f"loss {smooth_loss:.4f}", f"val {val_loss:.4f}" if val_loss is not None else None,
             f"lr {record['lr']:.2e}", f"norm {record['grad_norm']:.2f}",
             f"{format_count(record['tokens_per_s'])} tok/s", memory_text(device),
             f"skipped {skipped}" if skipped else None]
    return " | ".join(part for part in parts if part)
