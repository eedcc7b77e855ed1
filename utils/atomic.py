"""Writing that a crash cannot tear: a file or a folder is there whole, or not at all.

A save makes each of its system calls in sight (os.open, os.write, os.fsync, os.rename and the like, nothing inside a
library), so that the tests can let every single one fail, or let the process die there.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError

BLOCK = 2**20  # small writes are gathered up to so many bytes


class NewFile:
    """A file that is being written: counts and hashes what passes, and is on the disk itself once it is closed."""

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self.handle = os.open(path, flags, 0o666)
        self.size, self.sha256, self.error = 0, hashlib.sha256(), None
        self.gathered = bytearray()

    def write(self, data) -> int:
        """Take bytes, or anything with a buffer; OSError as os.write raises it, and from then on at every call."""
        view = memoryview(data).cast("B")
        if len(self.gathered) + len(view) < BLOCK:
            self.gathered += view
        else:
            self.flush()
            self._put(view)
        return len(view)

    def flush(self) -> None:
        self._put(memoryview(bytes(self.gathered)))
        self.gathered.clear()

    def close(self) -> None:
        """Bring what is written to the disk. Safe to call again."""
        if self.handle is None:
            return
        try:
            self.flush()
            os.fsync(self.handle)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close without finishing the file, after an error."""
        handle, self.handle = self.handle, None
        if handle is not None:
            os.close(handle)

    def _put(self, view: memoryview) -> None:
        if self.error is not None:  # torch.save goes on after an error, and reports another one at its end
            raise self.error
        try:
            while len(view):
                taken = os.write(self.handle, view)
                self.sha256.update(view[:taken])
                self.size += taken
                view = view[taken:]
        except OSError as error:
            self.error = error
            raise


def write_file(path: Path, fill) -> dict:
    """Write a file through fill(file), and return its {"name", "size", "sha256"}; OSError when it cannot be written."""
    with attach_path(path):
        file = NewFile(path)
        try:
            fill(file)
            file.close()
        except Exception:
            file.abandon()
            if file.error is not None:
                raise file.error from None
            raise
    return {"name": path.name, "size": file.size, "sha256": file.sha256.hexdigest()}


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one move, so that a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.tmp")
    write_file(beside, lambda file: file.write(text.encode("utf-8")))
    os.replace(beside, path)


def copy_file(source: Path, path: Path) -> None:
    """Copy a small file in one move."""
    beside = path.with_name(f".{path.name}.tmp")
    write_file(beside, lambda file: file.write(source.read_bytes()))
    os.replace(beside, path)


@contextmanager
def atomic_directory(folder: Path):
    """Yield a folder beside `folder` to write into; it takes its place when the block ends, or vanishes with an error.

    A process that dies leaves hidden folders at most, which the next call for the same `folder` clears away.
    """
    place, old = hidden(folder, "tmp"), hidden(folder, "old")
    remove(place)
    place.mkdir(parents=True)
    try:
        yield place
        sync_folder(place)
        if folder.exists():
            remove(old)
            os.rename(folder, old)
        os.rename(place, folder)
        sync_folder(folder.parent)
    except BaseException:
        remove(place)
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    remove(old)


def remove_folder(folder: Path) -> None:
    """Delete a folder: first its name, in one move, then what is in it, so that nobody sees half of it."""
    old = hidden(folder, "old")
    remove(old)
    os.rename(folder, old)
    remove(old)


def hidden(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def remove(folder: Path) -> None:
    """Delete a hidden folder; what cannot be deleted now is cleared away the next time."""
    shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; a system that opens no folders (Windows) keeps them in its own time."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below a folder; 0 when there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def attach_path(path: Path) -> Iterator[None]:
    """Within the block an OSError without a path, as a write raises it on a full disk, gets this one; so does one with
    two, as of a copy, whose first is what it read."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.filename2 is not None:
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a hidden sibling to write, which takes the place of `path` when the block ends, or goes with an error."""
    beside = path.with_name(f".{path.name}.partial")
    with attach_path(path):
        try:
            yield beside
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def partial(path: Path) -> Path:
    """The hidden sibling that a file is while it grows."""
    return hidden(path, "partial")


class GrowingFile:
    """Appends to the hidden sibling of `path`, of which the first `size` bytes are kept; UserError if it has fewer.

    Unbuffered: after `sync` the bytes are on the disk, so that a killed process can continue from there.
    """

    def __init__(self, path: Path, size: int = 0):
        self.path = path
        beside = partial(path)
        if size and not (beside.is_file() and beside.stat().st_size >= size):
            raise UserError(f"{beside} does not hold the {size} bytes that a stopped run wrote")
        self._file = open(beside, "r+b" if size else "wb", buffering=0)
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, data: bytes) -> None:
        view = memoryview(data).cast("B")
        with attach_path(self.path):
            while view:
                view = view[self._file.write(view) :]

    def sync(self) -> int:
        """Flush to the disk; returns the size."""
        with attach_path(self.path):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def blocks(self) -> Iterator[bytes]:
        """The contents, from the beginning."""
        with open(partial(self.path), "rb") as file:
            while block := file.read(1 << 22):
                yield block
