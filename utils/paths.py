"""Where a relative path leads: one rule for every script."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def project_path(path: str) -> str:
    """A path that starts with output/ lies in the project, wherever the command was typed; any other is the user's."""
    inside = Path(path).parts[:1] == ("output",) and Path.cwd() != PROJECT
    return str(PROJECT / path) if inside else path
