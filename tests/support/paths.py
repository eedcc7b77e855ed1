"""Where the repository is, and which files are its own."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {".git", ".venv", "output", "__pycache__", "node_modules", ".pytest_cache", ".ruff_cache", ".mypy_cache"}


def source_files() -> list[Path]:
    """Return what git tracks or would track, and every file where there is no git."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.split("\0")  # fmt: skip
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        files = [path for path in ROOT.rglob("*") if path.is_file()]
    return sorted(path for path in files if path.is_file() and not SKIPPED & set(path.relative_to(ROOT).parts))


def name_of(path: Path) -> str:
    """Return the path from the root, with slashes."""
    return path.relative_to(ROOT).as_posix()


def folder_of(path: Path) -> str:
    """Return the top folder of a file, "" for a file of the root."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else ""
