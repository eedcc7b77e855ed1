"""Skip optimizer steps whose loss or gradient norm is non-finite or an outlier among the recent steps.

The device decides, so that the host does not wait for it; the host reads the decision while the next step is computed.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple

import torch

from engine.runs.metrics import RunLog
from model.basemodel import BaseModel
from utils.errors import UserError
from utils.log import warn

MAX_BAD_STEPS = 10  # in a row: then the run stops
WINDOW = 128  # recent steps that a new one is compared with
MIN_RECENT = 32  # with fewer recent steps nothing is called a spike
MIN_SPREAD = 0.05  # of logarithms: even a loss that hardly moves may move by some percent
MAX_LOG = 88.0  # of fp32


class Unread(NamedTuple):
    """A decision that the host has not read yet."""

    values: Callable[[], list[float]]  # loss, gradient norm, and 1.0 for a step taken
    limits: list[float]  # of loss and norm
    step: int
    epoch: int
    sequences: list[int]


class BadStepFilter:
    """Per step: `snapshot_buffers()` before forward, `check()` before the update, `restore_buffers()` after it.

    A decision is read by the host after the backward pass of the next step has been queued, or earlier by `read()`,
    which must come before `state` is used or saved. It is always read before the next decision: each step is compared
    with all that were taken before it, and a resumed run decides as an uninterrupted one.
    """

    def __init__(
        self, model: BaseModel, spike_bound: float, state: dict[str, Any], run_log: RunLog, fp16: bool = False
    ) -> None:
        """state: the trainer's, which counts the steps. fp16: a non-finite gradient only lowers the loss scale."""
        self.model = model
        self.spike_bound = spike_bound
        self.state = state
        self.run_log = run_log
        self.fp16 = fp16
        for name in ("recent_losses", "recent_norms"):  # logarithms: both are positive, and vary by factors
            state.setdefault(name, [])
        saved = model.state_dict(keep_vars=True)
        self.buffer_names = [name for name, _ in model.named_buffers() if name in saved]  # the persistent ones
        self.before: list[torch.Tensor] = []
        self.unread: Unread | None = None
        self.last = (math.nan, math.nan)  # loss and gradient norm of the step read last

    def snapshot_buffers(self) -> None:
        """Copy the persistent buffers, before the step's first forward pass."""
        self.before = [self.model.get_buffer(name).clone() for name in self.buffer_names]

    def check(
        self, loss: torch.Tensor, norm: torch.Tensor, step: int, epoch: int, sequences: list[int]
    ) -> torch.Tensor:
        """Whether to take a step, 0-d bool on the device; equal on all processes, which see equal values.

        loss, norm: 0-d fp32, on the device. step (from 1), epoch and sequences: reported when it is skipped.
        """
        self.read()
        limits = [outlier_threshold(self.state[name], self.spike_bound) for name in ("recent_losses", "recent_norms")]
        good = loss.isfinite() & norm.isfinite() & (loss <= limits[0]) & (norm <= limits[1])
        values = start_reading(torch.stack([loss, norm, good.float()]))
        self.unread = Unread(values, limits, step, epoch, sequences)
        return good

    @torch.no_grad()
    def restore_buffers(self, good: torch.Tensor) -> None:
        """After a skipped step give the persistent buffers the values of the snapshot.

        Forward or `after_step` may have moved them; `after_step` moves nothing else (model/basemodel.py).
        """
        for name, before in zip(self.buffer_names, self.before):
            buffer = self.model.get_buffer(name)
            buffer.copy_(torch.where(good, buffer, before))

    def read(self) -> tuple[float, float]:
        """Loss and gradient norm of the step checked last, which the first call counts as taken or skipped.

        A skipped step is logged; UserError after MAX_BAD_STEPS in a row.
        """
        if self.unread is not None:
            unread, self.unread = self.unread, None
            loss, norm, good = unread.values()
            self.last = (loss, norm)
            if good:
                self._count_taken(unread.step)
            elif not (self.fp16 and math.isfinite(loss) and not math.isfinite(norm)):
                self._count_skipped(unread)
        return self.last

    def __enter__(self) -> "BadStepFilter":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A skipped step is logged even when the run fails in the step after it."""
        if error_type is not None:
            with suppress(Exception):
                self.read()

    def _count_taken(self, step: int) -> None:
        self.state["bad_in_a_row"] = 0
        self.state["smooth_loss"] += (self.last[0] - self.state["smooth_loss"]) * max(0.1, 1 / step)
        for value, name in zip(self.last, ("recent_losses", "recent_norms")):
            if value > 0:
                self.state[name].append(math.log(value))
            del self.state[name][:-WINDOW]

    def _count_skipped(self, unread: Unread) -> None:
        loss, norm = self.last
        _, limits, step, epoch, sequences = unread
        if not (math.isfinite(loss) and math.isfinite(norm)):
            reason = f"loss {loss}, gradient norm {norm}"
        else:
            what, value, recent = (
                ("loss", loss, "recent_losses") if loss > limits[0] else ("gradient norm", norm, "recent_norms")
            )
            reason = f"a spike: {what} {value:.4g}, recent median {math.exp(median(self.state[recent])):.4g}"
        self.state["skipped"] += 1
        self.state["bad_in_a_row"] += 1
        self.run_log.skipped({"step": step, "skipped": reason, "epoch": epoch, "rows": sequences})
        shown = f"{sequences[:8]}{' ...' if len(sequences) > 8 else ''}"
        warn(f"step {step} skipped: {reason}; epoch {epoch}, sequences {shown}")
        if self.state["bad_in_a_row"] >= MAX_BAD_STEPS:
            raise UserError(
                f"{MAX_BAD_STEPS} steps in a row were skipped, the last {step} ({reason}): lower "
                "--max_lr, use --precision=fp32, set --spike_bound=0 if such steps are right, or inspect "
                "the data; the last checkpoint is kept"
            )


def outlier_threshold(recent: list[float], bound: float) -> float:
    """The largest value that is not an outlier: `bound` robust standard deviations above the median of `recent`.

    recent: logarithms. The deviation is 1.4826 times the median distance from the median, which a few outliers hardly
    change. Infinite when `bound` is 0 or there are fewer than MIN_RECENT values.
    """
    if not bound or len(recent) < MIN_RECENT:
        return math.inf
    middle = median(recent)
    spread = 1.4826 * median(abs(x - middle) for x in recent)
    logarithm = middle + bound * max(spread, MIN_SPREAD)
    return math.exp(logarithm) if logarithm < MAX_LOG else math.inf


def start_reading(tensor: torch.Tensor) -> Callable[[], list[float]]:
    """Start copying a tensor to the host; the returned function waits for that copy alone and gives the values.

    On MPS a copy cannot be waited for alone, so it waits for everything queued.
    """
    if not tensor.is_cuda:
        return tensor.tolist
    copy = tensor.to("cpu", non_blocking=True)  # PyTorch makes it pinned memory
    arrived = torch.cuda.Event()
    arrived.record()

    def values() -> list[float]:
        arrived.synchronize()
        return copy.tolist()

    return values
