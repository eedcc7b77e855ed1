"""Which steps may be taken: not one whose loss or gradient is no number, nor one that stands out from those before.

The device decides, so that the host never waits for what it has just told it; the host counts when the next step is on
its way.
"""

import math
from contextlib import suppress
from statistics import median

import torch

from model.basemodel import BaseModel
from utils.errors import UserError
from utils.log import warn

MAX_BAD_STEPS = 10  # so many in a row are no accident
WINDOW = 128  # the steps that a new one is compared with
ENOUGH = 32  # before so many have been taken, nothing is called a spike
LEAST_SPREAD = 0.05  # of logarithms: a loss that hardly moves may still move by some percent
LARGEST_LOGARITHM = 88  # of an fp32 number


class BadStepFilter:
    """For each step: `remember()` before its forward passes, `judge()` before its update, `settle()` after it.

    The numbers of a step are read when the backward pass of the next one has been told to the device, or earlier by
    `read()`, which must come before `state` is used or saved. They are always read before the next verdict: each
    step is compared with all that were taken before it, and a resumed run judges as the undisturbed one.
    """

    def __init__(self, model, spike_bound: float, state: dict, run_log, overflows: bool = False):
        """state: the trainer's, in which steps are counted. overflows: fp16 finds its scale so, which is no fault."""
        self.spike_bound, self.state, self.run_log, self.overflows = spike_bound, state, run_log, overflows
        for name in ("recent_losses", "recent_norms"):  # logarithms: both are positive, and vary by factors
            state.setdefault(name, [])
        # buffers that are saved; one that is not is a table that stays as it was built
        self.buffers = [
            (module, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]
        self.waits = type(model).after_step is not BaseModel.after_step and not model.after_step_keeps_to_buffers
        self.before, self.unread, self.numbers = [], None, (math.nan, math.nan)

    def remember(self) -> None:
        """Note the buffers as they are before the step's first forward pass."""
        self.before = [module._buffers[name].clone() for module, name in self.buffers]

    def judge(self, loss: torch.Tensor, norm: torch.Tensor, step: int, epoch: int, rows: list[int]) -> torch.Tensor:
        """Whether a step may be taken, 0-d bool on the device. All processes see the same numbers and say the same.

        loss, norm: 0-d fp32, on the device. step (from 1), epoch and rows: what is said of it if it may not.
        """
        self.read()
        limits = [largest(self.state[recent], self.spike_bound) for recent in ("recent_losses", "recent_norms")]
        good = loss.isfinite() & norm.isfinite() & (loss <= limits[0]) & (norm <= limits[1])
        self.unread = fetch(torch.stack([loss, norm, good.float()])), limits, step, epoch, rows
        return good

    def __enter__(self):
        return self

    def __exit__(self, failure, *_):
        """What was skipped is said, whatever ended the run in the step after it."""
        if failure is not None:
            with suppress(Exception):
                self.read()

    @torch.no_grad()
    def settle(self, good: torch.Tensor, after_step) -> None:
        """Call `after_step` of a step that was taken; give the saved buffers of one that was not the values that
        `remember` noted. Only a model whose `after_step` may do more than move those is waited for."""
        if self.waits and good:
            return after_step()
        if not self.waits:
            after_step()
        for (module, name), before in zip(self.buffers, self.before):
            buffer = module._buffers[name]
            buffer.copy_(torch.where(good, buffer, before))

    def read(self) -> tuple[float, float]:
        """Loss and gradient norm of the step judged last, which is counted at the first call.

        One that was not taken is written down and said; UserError after too many in a row.
        """
        if self.unread is not None:
            (numbers, limits, step, epoch, rows), self.unread = self.unread, None
            *self.numbers, good = numbers()
            if good:
                self._taken(step)
            elif not (self.overflows and math.isfinite(self.numbers[0]) and not math.isfinite(self.numbers[1])):
                self._skipped(limits, step, epoch, rows)
        return tuple(self.numbers)

    def _taken(self, step: int) -> None:
        self.state["bad_in_a_row"] = 0
        self.state["smooth_loss"] += (self.numbers[0] - self.state["smooth_loss"]) * max(0.1, 1 / step)
        for value, name in zip(self.numbers, ("recent_losses", "recent_norms")):
            if value > 0:
                self.state[name].append(math.log(value))
            del self.state[name][:-WINDOW]

    def _skipped(self, limits: list[float], step: int, epoch: int, rows: list[int]) -> None:
        loss, norm = self.numbers
        if not (math.isfinite(loss) and math.isfinite(norm)):
            objection = f"loss {loss}, gradient norm {norm}"
        else:
            what, value, recent = (
                ("loss", loss, "recent_losses") if loss > limits[0] else ("gradient norm", norm, "recent_norms")
            )
            objection = f"a spike: {what} {value:.4g}, of late {math.exp(median(self.state[recent])):.4g}"
        self.state["skipped"] += 1
        self.state["bad_in_a_row"] += 1
        self.run_log.skipped({"step": step, "skipped": objection, "epoch": epoch, "rows": rows})
        warn(f"step {step} skipped: {objection}; epoch {epoch}, rows {rows[:8]}{' ...' if len(rows) > 8 else ''}")
        if self.state["bad_in_a_row"] >= MAX_BAD_STEPS:
            raise UserError(
                f"{MAX_BAD_STEPS} steps in a row were skipped, the last {step} ({objection}): lower "
                "--max_lr, use --precision=fp32, set --spike_bound=0 if such steps are right, or look at "
                "the data; the last checkpoint is kept"
            )


def largest(recent: list[float], bound: float) -> float:
    """The largest value that is no spike: `bound` robust standard deviations above the median of `recent` logarithms.

    The deviation is 1.4826 times the median distance from the median, which a few spikes among them hardly change.
    Infinite without a bound, or enough to compare with.
    """
    if not bound or len(recent) < ENOUGH:
        return math.inf
    middle = median(recent)
    spread = 1.4826 * median(abs(x - middle) for x in recent)
    logarithm = middle + bound * max(spread, LEAST_SPREAD)
    return math.exp(logarithm) if logarithm < LARGEST_LOGARITHM else math.inf


def fetch(tensor: torch.Tensor):
    """Send a tensor to the host; what is returned gives its numbers, and waits for nothing that came after it.

    On MPS, where a copy cannot be waited for alone, it waits for all.
    """
    if not tensor.is_cuda:
        return tensor.tolist
    copy, arrived = tensor.to("cpu", non_blocking=True), torch.cuda.Event()  # PyTorch makes it pinned memory
    arrived.record()

    def numbers():
        arrived.synchronize()
        return copy.tolist()

    return numbers
