"""How many threads a forward pass of inference takes on a CPU: what its size suggests, then what its times show.

An operator of a small decode step takes microseconds, of which a second thread saves none. Next to another busy program
it costs a multiple, since every operator then waits for a thread that has no core. A large step gains by all cores.
What pays depends on the model, on its compilation, on the machine and on the other programs there, which come and go.
"""

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

from model.basemodel import BaseModel

AVAILABLE = torch.get_num_threads()  # read here: a new thread gets the number that any thread has set last
OF_THE_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # where they are set, the number is not changed

WORK = 2**25  # parameters x tokens of a forward pass that a thread should have
TIMED = 64  # tokens; a longer pass is a prompt, whose time says little about the next one
STEPS = 5  # in a trial
REST = 20  # times the seconds of a trial until the next one
GAIN = 0.9  # more threads must take at most this share of the time that fewer take


class StepThreads:
    """Sets the number of threads of each forward pass of a model on the CPU, at most `limit`."""

    def __init__(self, model: BaseModel, limit: int | None = None) -> None:
        """limit: default the number that the calling thread uses."""
        self.limit = torch.get_num_threads() if limit is None else limit
        self._active = model.num_params()["active"]
        given = any(name in os.environ for name in OF_THE_USER)
        self._chosen_here = not given and next(model.parameters()).device.type == "cpu"
        self._choices: dict[int, Choice] = {}

    @contextmanager
    def running(self, n_tokens: int) -> Iterator[None]:
        """A context for a pass of `n_tokens` in total. The number of threads stays as it is afterwards."""
        if self.limit == 1 or not self._chosen_here:
            yield
            return
        fitting = min(self.limit, max(1, self._active * n_tokens // WORK))
        if n_tokens > TIMED:
            set_threads(fitting)
            yield
            return
        choice = self._choices.setdefault(n_tokens.bit_length(), Choice(fitting, self.limit))
        set_threads(choice.threads)
        started = time.perf_counter()
        yield
        choice.record(time.perf_counter() - started)


class Choice:
    """The number of `threads`, up to `limit`, for the next of many similar steps.

    Now and then half or twice as many are tried for a few steps: all trials together take a twentieth of the time.
    """

    def __init__(self, threads: int, limit: int) -> None:
        self.threads = threads
        self.limit = limit
        self._chosen = threads
        self._times: deque[float] = deque(maxlen=STEPS)  # of the latest steps with the chosen number
        self._trial: list[float] = []
        self._rest = 0.0  # seconds until the next trial
        self._up = True  # the direction of the trials: it turns after one that did not pay

    def record(self, seconds: float) -> None:
        """Take the time of a step with `threads`, and choose those of the next one."""
        if self.threads == self._chosen:
            self._times.append(seconds)
            self._rest -= seconds
            if self._rest <= 0 and len(self._times) == STEPS:
                self.threads = self._candidate()
                self._trial = []
            return
        self._trial.append(seconds)
        if len(self._trial) == STEPS or seconds > 2 * median(self._times):
            self._decide()

    def _candidate(self) -> int:
        """Return half or twice the chosen number."""
        self._up = self._chosen == 1 or (self._up and self._chosen < self.limit)
        return min(self.limit, 2 * self._chosen) if self._up else self._chosen // 2

    def _decide(self) -> None:
        """End the trial, and keep its number of threads if it pays."""
        before, tried = median(self._times), median(self._trial)
        spent = sum(self._trial)
        if tried < GAIN * before if self._up else GAIN * tried < before:
            self._chosen = self.threads
            self._times = deque(self._trial, maxlen=STEPS)
            self._rest = spent
        else:
            self._rest = REST * spent
            self._up = not self._up
        self.threads = self._chosen


def set_threads(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


@contextmanager
def kept_threads() -> Iterator[None]:
    """A context after which the calling thread uses as many threads as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        set_threads(before)
