"""Files of other people: JSON that may be damaged, git-lfs pointers, and where a relative path leads."""

import json
from pathlib import Path
from typing import Any

from utils.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent
LFS_POINTER = b"version https://git-lfs"  # how the text in place of a large file begins


def load_json(path: str | Path, advice: str) -> dict[str, Any]:
    """Read a JSON object; UserError, ending in `advice`, when the file is missing, damaged or holds anything else."""
    require_content(Path(path))
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): {advice}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {advice}")
    return value


def require_content(path: Path) -> None:
    """Raise UserError for a git-lfs pointer, which is there until the file itself has been fetched."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(64)
    except OSError:
        return
    if beginning.startswith(LFS_POINTER):
        raise UserError(f"{path} is a git-lfs pointer and not the file itself: fetch it with `git lfs pull`")


def project_path(path: str) -> str:
    """Resolve a path that starts with output/ against the project, from any working directory; leave others alone."""
    inside = Path(path).parts[:1] == ("output",) and Path.cwd() != PROJECT
    return str(PROJECT / path) if inside else path
