"""Which steps may be taken: not one whose loss or gradient is no number, nor one that stands out from those before."""

import math
from statistics import median

import torch

from utils.errors import UserError
from utils.log import warn

MAX_BAD_STEPS = 10  # so many in a row are no accident
WINDOW = 128  # the steps that a new one is compared with
ENOUGH = 32  # before so many have been taken, nothing is called a spike
LEAST_SPREAD = 0.05  # of logarithms: a loss that hardly moves may still move by some percent


class StepGuard:
    """Judges each step between its backward pass and its update, and undoes what a skipped one did to the buffers.

    What it remembers stands in `state`, so that a resumed run judges as the undisturbed one.
    """

    def __init__(self, model, spike_bound: float, state: dict):
        self.spike_bound, self.state = spike_bound, state
        for name in ("recent_losses", "recent_norms"):  # logarithms: both are positive, and vary by factors
            state.setdefault(name, [])
        # buffers that are saved; one that is not is a table that stays as it was built
        self.buffers = [(module, name) for module in model.modules() for name, buffer in module._buffers.items()
                        if buffer is not None and name not in module._non_persistent_buffers_set]
        self.before = []

    def remember(self) -> None:
        """Note the buffers as they are before the step's first forward pass."""
        self.before = [module._buffers[name].clone() for module, name in self.buffers]

    def objection(self, loss: float, norm: float) -> str:
        """Why the step must not be taken, or nothing. All processes see the same numbers and say the same."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss}, gradient norm {norm}"
        for what, value, recent in (("loss", loss, "recent_losses"), ("gradient norm", norm, "recent_norms")):
            if self.spike_bound and stands_out(value, self.state[recent], self.spike_bound):
                usual = math.exp(median(self.state[recent]))
                return f"a spike: {what} {value:.4g}, of late {usual:.4g}"
        return ""

    def taken(self, loss: float, norm: float) -> None:
        """Note a step that was taken."""
        self.state["bad_in_a_row"] = 0
        for value, recent in ((loss, self.state["recent_losses"]), (norm, self.state["recent_norms"])):
            if value > 0:
                recent.append(math.log(value))
            del recent[:-WINDOW]

    def skipped(self, step: int, objection: str, epoch: int, rows: list[int]) -> None:
        """Put the buffers back, count and say it; UserError after too many in a row."""
        self.undo()
        self.state["skipped"] += 1
        self.state["bad_in_a_row"] += 1
        warn(f"step {step} skipped: {objection}; epoch {epoch}, rows {rows[:8]}{' ...' if len(rows) > 8 else ''}")
        if self.state["bad_in_a_row"] >= MAX_BAD_STEPS:
            raise UserError(f"{MAX_BAD_STEPS} steps in a row were skipped, the last {step} ({objection}): lower "
                            "--max_lr, use --precision=fp32, set --spike_bound=0 if such steps are right, or look at "
                            "the data; the last checkpoint is kept")

    @torch.no_grad()
    def undo(self) -> None:
        """Give the saved buffers the values that `remember` noted."""
        for (module, name), value in zip(self.buffers, self.before):
            module._buffers[name].copy_(value)


def stands_out(value: float, recent: list[float], bound: float) -> bool:
    """Whether log(value) lies more than `bound` robust standard deviations above the median of `recent` logarithms.

    The deviation is 1.4826 times the median distance from the median, which a few spikes among them hardly change.
    """
    if len(recent) < ENOUGH or value <= 0:
        return False
    middle = median(recent)
    spread = 1.4826 * median(abs(x - middle) for x in recent)
    return math.log(value) - middle > bound * max(spread, LEAST_SPREAD)
