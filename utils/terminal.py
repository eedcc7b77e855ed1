"""Terminal output: colours where they are wanted, and text without control characters."""

import locale
import os
import sys
import unicodedata
from types import ModuleType
from typing import TextIO

STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
RESET = "\033[0m"
# Besides the C0 and C1 control characters (escape sequences start with one), those that reorder the text around them.
BIDI_CONTROLS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def strip_control_chars(text: str) -> str:
    """Return the text without control characters, except newline and tab: safe to print on a terminal."""
    return "".join(
        char
        for char in text
        if char in "\n\t" or not (unicodedata.category(char) in ("Cc", "Cs") or char in BIDI_CONTROLS)
    )


def colourful(stream: TextIO | None = None) -> bool:
    """Return whether `stream` (default stdout) gets colours: it is a terminal, and NO_COLOR is not set."""
    stream = stream or sys.stdout
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(text: str, *styles: str, stream: TextIO | None = None) -> str:
    """Return the text in these styles for a terminal, unchanged for any other stream."""
    if not colourful(stream):
        return text
    return f"{_start(styles)}{text}{RESET}"


def prompt(text: str, *styles: str) -> str:
    """Read a line from the terminal; EOFError and KeyboardInterrupt pass through.

    The marks \\001 and \\002 enclose characters of width 0 for readline; without them long lines wrap wrongly.
    """
    if not colourful():
        return input(text)
    return input(f"\001{_start(styles)}\002{text}\001{RESET}\002")


def use_utf8() -> None:
    """Set UTF-8 for input and output, whatever the locale; an invalid byte becomes a replacement character.

    readline counts columns by the locale of the C library, which it reads from the environment before every line; a
    Chinese character takes two.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if "utf" not in (locale.setlocale(locale.LC_CTYPE) or "").lower():
        os.environ["LC_ALL"] = "C.UTF-8"


def line_history(name: str) -> None:
    """Give `input` line editing and a persistent history; without readline, do nothing."""
    try:
        import readline
    except ImportError:
        return
    import atexit

    folder = os.path.join(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "mini_llm")
    path = os.path.join(folder, name)
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(path):
            readline.read_history_file(path)
    except OSError:
        return  # the home cannot be written to: the history lasts one session
    readline.set_history_length(1000)
    atexit.register(_save_history, readline, path)


def _start(styles: tuple[str, ...]) -> str:
    return f"\033[{';'.join(STYLES[style] for style in styles)}m"


def _save_history(readline: ModuleType, path: str) -> None:
    try:
        readline.write_history_file(path)
    except OSError:
        pass
