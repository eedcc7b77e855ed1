"""Logging of the main process, a progress bar, and the formats of numbers in both."""

import os
import sys
import time
from typing import Any


def is_main_process() -> bool:
    """True in the process that logs and writes (torchrun sets RANK)."""
    return os.environ.get("RANK", "0") == "0"


def log(message: str = "") -> None:
    """Print a line, on the main process only."""
    if is_main_process():
        print(message, flush=True)


def warn(message: str) -> None:
    """Print a warning line on stderr, on the main process only."""
    if is_main_process():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """3725 -> '1h02m'; 125 -> '2m05s'; 7.2 -> '7s'."""
    seconds = int(max(0, seconds))
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def format_count(number: float) -> str:
    """1234 -> '1.2k'; 98_000_000 -> '98.0M'."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:g}"


def format_bytes(number: float) -> str:
    """1234 -> '1.2 KB'; 3_500_000_000 -> '3.3 GB' (powers of 1024)."""
    for power, unit in ((3, "GB"), (2, "MB"), (1, "KB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.1f} {unit}"
    return f"{number:g} B"


class Progress:
    """A progress bar on a terminal; elsewhere (a log file, CI) lines with the same text.

    `update(done, text)` moves to `done` of `total`; without a terminal it prints a line only when `text` is given.
    """

    def __init__(self, total: int, initial: int = 0, label: str = "") -> None:
        self.total = total
        self.initial = initial
        self.label = label
        self.start = time.time()
        self.bar: Any = None
        if is_main_process() and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=initial, desc=label, dynamic_ncols=True, leave=True)

    def update(self, done: int, text: str | None = None) -> None:
        """Move to `done`, and show `text`."""
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
            if text is not None:
                self.bar.set_postfix_str(text)
        elif text is not None:
            rate = (time.time() - self.start) / max(1, done - self.initial)
            log(f"{self.label} {done}/{self.total} | {text} | ETA {format_seconds(rate * (self.total - done))}")

    def write(self, message: str) -> None:
        """Print a line without breaking the bar."""
        if self.bar is not None:
            self.bar.write(message)
        else:
            log(message)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
