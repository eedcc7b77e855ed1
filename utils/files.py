"""Files of other people: JSON that may be damaged, and where a relative path leads."""

import json
from pathlib import Path
from typing import Any

from utils.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent


def load_json(path: str | Path, advice: str) -> dict[str, Any]:
    """Read a JSON object; UserError, ending in `advice`, when the file is missing, damaged or holds anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): {advice}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {advice}")
    return value


def project_path(path: str) -> str:
    """Resolve a path that starts with output/ against the project, from any working directory; leave others alone."""
    inside = Path(path).parts[:1] == ("output",) and Path.cwd() != PROJECT
    return str(PROJECT / path) if inside else path
