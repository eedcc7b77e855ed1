"""Logs the metrics of a run: metrics.jsonl, TensorBoard, the loss curve. other_vars are logged by their shape."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils.atomic import atomic_write, write_text
from utils.log import format_count, warn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LARGEST_BIN = 9e19  # of TensorBoard's histograms, which fail at larger values


class RunLog:
    """Writes the metrics of a run on the main process; with folder None every method does nothing.

    After a resume at step s the records after s are dropped, so the file reads as if the run had never stopped.
    """

    def __init__(self, folder: Path | None, start_step: int) -> None:
        self.folder = folder
        if folder is None:
            return
        self.path = folder / "metrics.jsonl"
        # the evaluation at the end is repeated when the process died after it
        kept = [r for r in read_metrics(self.path) if r["step"] <= start_step and not r.get("final")]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = open(self.path, "ab", buffering=0)
        self.unwritten = b""
        self.failing = False  # the last write failed
        self.board: SummaryWriter | None = open_board(folder, start_step)

    def step(self, record: dict, other_vars: dict[str, torch.Tensor]) -> None:
        """Log one training step; record: step, tokens, loss, bpc (or None), lr, grad_norm, tokens_per_s, mfu."""
        if self.folder is None:
            return
        self._write(record)
        for name in ("loss", "bpc", "lr", "grad_norm", "tokens_per_s", "mfu"):
            if record[name] is not None:
                self._show("scalar", f"train/{name}", record[name], record["step"])
        for name, value in other_vars.items():
            self._add(name, value.detach().float().cpu(), record["step"])

    def evaluation(self, record: dict) -> None:
        """Log one evaluation and draw the curve so far; record: step, tokens, val_loss, and val_bpc if known."""
        if self.folder is None:
            return
        self._write(record)
        for name in ("val_loss", "val_bpc"):
            if record.get(name) is not None:
                self._show("scalar", name.replace("_", "/"), record[name], record["step"])
        with self._tolerate_full_disk():
            draw_curve(self.path, self.folder / "loss_curve.png")

    def text(self, name: str, value: str, step: int) -> None:
        """Log a text to TensorBoard."""
        if self.folder is not None:
            self._show("text", name, value, step)

    def skipped(self, record: dict) -> None:
        """Log a skipped step; record: step, reason ("skipped"), epoch, sequence indices of the batch ("rows")."""
        if self.folder is not None:
            self._write(record)

    def sync(self) -> None:
        """Flush the records to the disk, before a checkpoint: it must not be newer than they are."""
        if self.folder is not None:
            with self._tolerate_full_disk():
                os.fsync(self.file.fileno())

    def close(self) -> None:
        """Flush everything and draw loss_curve.png with the last steps."""
        if self.folder is None:
            return
        with self._tolerate_full_disk():
            self.file.close()
            if self.board is not None:
                self.board.close()
            draw_curve(self.path, self.folder / "loss_curve.png")

    def _write(self, record: dict) -> None:
        """Append a record; what does not fit on the disk is written with the next one. NaN and inf become null."""
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self.unwritten += json.dumps(plain).encode() + b"\n"
        with self._tolerate_full_disk():
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def _show(self, kind: str, *arguments: Any) -> None:
        """Log a scalar, a histogram or a text to TensorBoard; its writer fails for good, and is then reopened."""
        if self.board is None and self.failing:
            return  # until a record of metrics.jsonl has been written
        with self._tolerate_full_disk():
            try:
                if self.board is None:
                    assert self.folder is not None
                    self.board = open_board(self.folder)
                getattr(self.board, f"add_{kind}")(*arguments)
            except OSError:
                self.board = None
                raise

    @contextmanager
    def _tolerate_full_disk(self) -> Iterator[None]:
        """Turn an OSError of the block into a warning, once until a block succeeds again."""
        try:
            yield
            self.failing = False
        except OSError as error:
            if not self.failing:
                warn(f"{self.folder}: its curves cannot be written ({error}); the run continues")
            self.failing = True

    def _add(self, name: str, value: torch.Tensor, step: int) -> None:
        if value.ndim == 0:
            self._show("scalar", name, value.item(), step)
        elif value.ndim <= 2 and value.numel() and bool((value.abs() < LARGEST_BIN).all()):  # also False for NaN
            layers = value if value.ndim == 2 else value[None]
            for i, layer in enumerate(layers):
                self._show("histogram", f"{name}/{i:02d}" if value.ndim == 2 else name, layer, step)


def open_board(folder: Path, start_step: int = 0) -> "SummaryWriter":
    """Open the TensorBoard writer of a run; what an earlier process wrote after start_step is hidden."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return SummaryWriter(str(folder / "logs"), purge_step=start_step + 1 if start_step else None)


def read_metrics(path: Path) -> list[dict]:
    """Read the records of a metrics.jsonl; a last line that a crash cut off is left out."""
    records = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                continue
    return [record for record in records if isinstance(record, dict) and isinstance(record.get("step"), int)]


def draw_curve(metrics: Path, picture: Path) -> None:
    """Draw the training loss, its moving average and the held-out loss over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    held_out = [(r["step"], r["val_loss"], r.get("val_targets")) for r in records if r.get("val_loss") is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    if train:
        steps, losses = zip(*train)
        half = len(losses) // 20
        windows = (
            losses[max(0, i - half) : i + half + 1] for i in range(len(losses))
        )  # centred, so that it does not lag
        axes.plot(steps, losses, color="tab:blue", alpha=0.25)
        axes.plot(steps, [sum(window) / len(window) for window in windows], color="tab:blue", label="training")
    if held_out:
        # The evaluation at the end may read more data than those before it: another set, so another mark.
        same = [(step, loss) for step, loss, targets in held_out if targets == held_out[0][2]]
        other = [(step, loss) for step, loss, targets in held_out if targets != held_out[0][2]]
        axes.plot(*zip(*same), "o-", color="tab:orange", markersize=3, label="held out")
        if other:
            axes.plot(*zip(*other), "D", color="tab:red", markersize=5, label="held out, at the end over more of it")
    if train or held_out:
        axes.legend()
    axes.grid(alpha=0.3)
    axes.set_title(metrics.parent.name)
    with atomic_write(picture) as temporary:
        figure.savefig(temporary, format="png")


def log_text(record: dict, smooth_loss: float, val_loss: float | None, skipped: int, memory: int) -> str:
    """Return the figures of a log line; loss and bits per character (bpc) are smoothed. memory: peak in bytes."""
    bpc = record["bpc"] * smooth_loss / record["loss"] if record["bpc"] and record["loss"] else None
    parts = [
        f"loss {smooth_loss:.4f}",
        f"bpc {bpc:.4f}" if bpc is not None else None,
        f"val {val_loss:.4f}" if val_loss is not None else None,
        f"lr {record['lr']:.2e}",
        f"norm {record['grad_norm']:.2f}",
        f"{format_count(record['tokens_per_s'])} tok/s",
        f"MFU {record['mfu']:.1%}",
        f"{memory / 2**30:.1f} GB",
        f"skipped {skipped}" if skipped else None,
    ]
    return " | ".join(part for part in parts if part)
