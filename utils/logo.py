"""The logo, printed on terminals only."""

import sys
from typing import TextIO

from utils.terminal import paint

LOGO = r"""
 __  __ _       _       _     _     __  __
|  \/  (_)_ __ (_)     | |   | |   |  \/  |
| |\/| | | '_ \| |_____| |   | |   | |\/| |
| |  | | | | | | |_____| |___| |___| |  | |
|_|  |_|_|_| |_|_|     |_____|_____|_|  |_|
"""


def print_logo(subtitle: str = "", stream: TextIO | None = None) -> None:
    """Print the logo and a line below it if the stream (default stdout) is a terminal."""
    stream = stream or sys.stdout
    if stream.isatty():
        print(paint(LOGO.strip("\n"), "cyan", stream=stream), file=stream)
        print(paint(subtitle, "dim", stream=stream) + "\n" if subtitle else "", file=stream)
