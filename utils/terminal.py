"""What a terminal needs: colours where they are wanted, and text that cannot command it."""

import locale
import os
import sys
import unicodedata

STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
RESET = "\033[0m"
# Besides the C0 and C1 control characters (escape sequences start with one), those that reorder the text around them.
BIDI_CONTROLS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def strip_control_chars(text):
    """The text without control characters, except newline and tab: it can be printed, and does nothing else."""
    return "".join(
        char
        for char in text
        if char in "\n\t" or not (unicodedata.category(char) in ("Cc", "Cs") or char in BIDI_CONTROLS)
    )


def colourful(stream=None):
    """Whether to colour what goes to this stream (default stdout): a terminal, and NO_COLOR is not set."""
    stream = stream or sys.stdout
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(text, *styles, stream=None):
    """The text in these styles, for a stream that is a terminal; unchanged for any other."""
    if not colourful(stream):
        return text
    return f"{_start(styles)}{text}{RESET}"


def prompt(text, *styles):
    """Ask for a line on the terminal; EOFError and KeyboardInterrupt pass through.

    The marks \\001 and \\002 tell readline which characters take no room; without them long lines wrap wrongly.
    """
    if not colourful():
        return input(text)
    return input(f"\001{_start(styles)}\002{text}\001{RESET}\002")


def speak_utf8():
    """UTF-8 in and out, whatever the locale says; a stray byte, or a half character, is shown as one that is none.

    The C library has to know as well: readline counts the columns of a line by it, where a Chinese character takes two,
    and it asks the environment before every line.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if "utf" not in (locale.setlocale(locale.LC_CTYPE) or "").lower():
        os.environ["LC_ALL"] = "C.UTF-8"


def line_history(name):
    """Give `input` line editing, and a history that outlives the program; without readline, nothing happens."""
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
        return  # a home that cannot be written to: the history then lasts one session
    readline.set_history_length(1000)
    atexit.register(_save_history, readline, path)


def _start(styles):
    return f"\033[{';'.join(STYLES[style] for style in styles)}m"


def _save_history(readline, path):
    try:
        readline.write_history_file(path)
    except OSError:
        pass
