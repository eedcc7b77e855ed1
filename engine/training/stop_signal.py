"""SIGTERM and Ctrl-C: save at the next step; a second one ends at once."""

import os
import signal
import threading
import time

from utils.log import is_main_process

ECHO_SECONDS = 2  # Ctrl-C under torchrun arrives twice, from the terminal and from torchrun: that is one wish


class StopSignal:
    """`wanted` is 1 after the first signal, and `name` says which. A context manager: the old handlers come back."""

    def __init__(self):
        self.wanted, self.name, self.since, self.old = 0, "", 0.0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        if self.wanted:
            if time.monotonic() - self.since > ECHO_SECONDS:
                os._exit(128 + number)
            return
        self.wanted, self.name, self.since = 1, signal.Signals(number).name, time.monotonic()
        if is_main_process():  # not through print: the signal may have come in the middle of one
            os.write(2, f"\n{self.name}: saving at the next step, then stopping; once more to stop at once\n".encode())
