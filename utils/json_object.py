"""Reading JSON that others wrote: an object, or one line about what is wrong with the file."""

import json
from pathlib import Path

from utils.errors import UserError


def load_json(path, mend: str) -> dict:
    """A file's JSON object; UserError, with `mend` for what to do, when it is missing, torn or holds anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): {mend}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {mend}")
    return value
