"""Files that are replaced in one move, and errors of writing that say which file it was."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within the block an OSError without a path, as a write raises it on a full disk, gets this one; so does one with
    two, as of a copy, whose first is what it read."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.filename2 is not None:
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden sibling to write, which takes the place of `path` when the block ends, or goes with an error."""
    beside = path.with_name(f".{path.name}.partial")
    with naming(path):
        try:
            yield beside
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
