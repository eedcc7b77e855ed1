"""SIGTERM and Ctrl-C stop a run after the current step, once it is saved; a second signal ends it at once."""

import os
import signal
import threading
import time
from typing import Any

from utils.log import is_main_process

ECHO_SECONDS = 2  # under torchrun Ctrl-C arrives twice, from the terminal and from torchrun: one request


class StopSignal:
    """`wanted` is 1 after the first signal, `name` is its name. A context manager that restores the old handlers."""

    def __init__(self) -> None:
        self.wanted = 0
        self.name = ""
        self.since = 0.0
        self.old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.wanted:
            if time.monotonic() - self.since > ECHO_SECONDS:
                os._exit(128 + number)
            return
        self.wanted = 1
        self.name = signal.Signals(number).name
        self.since = time.monotonic()
        if is_main_process():  # os.write, because the signal may have interrupted a print
            os.write(2, f"\n{self.name}: saving at the next step, then stopping; once more to stop at once\n".encode())
