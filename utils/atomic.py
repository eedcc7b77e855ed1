"""Atomic writes: after a crash a file or a directory is complete, or it does not exist under its name.

A save makes every system call here, by name (os.open, os.write, os.fsync, os.rename, ...), and none inside a library,
so that the tests can let each of them fail, or end the process there.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.errors import UserError

BUFFER_BYTES = 2**20  # small writes are collected up to this size


class NewFile:
    """A file being written, which counts and hashes its content; `close` flushes it to the disk."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self.handle: int | None = os.open(path, flags, 0o666)
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None
        self._buffer = bytearray()

    def write(self, data: Any) -> int:
        """Write bytes, or any object with a buffer; after an OSError every further call raises it again."""
        view = memoryview(data).cast("B")
        if len(self._buffer) + len(view) < BUFFER_BYTES:
            self._buffer += view
        else:
            self.flush()
            self._write(view)
        return len(view)

    def flush(self) -> None:
        """Write what is buffered to the file, without an fsync."""
        self._write(memoryview(bytes(self._buffer)))
        self._buffer.clear()

    def close(self) -> None:
        """Flush the content to the disk and close the file; a second call does nothing."""
        if self.handle is None:
            return
        try:
            self.flush()
            os.fsync(self.handle)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file without completing it, after an error."""
        handle = self.handle
        self.handle = None
        if handle is not None:
            os.close(handle)

    def _write(self, view: memoryview) -> None:
        if self.error is not None:  # torch.save continues after an error, and raises a different one at its end
            raise self.error
        assert self.handle is not None
        try:
            while len(view):
                count = os.write(self.handle, view)
                self.sha256.update(view[:count])
                self.size += count
                view = view[count:]
        except OSError as error:
            self.error = error
            raise


class GrowingFile:
    """Appends to the hidden sibling of `path`, of which the first `size` bytes are kept; UserError if it has fewer.

    Unbuffered: after `sync` the bytes are on the disk, so that a killed process can continue from there.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        growing = partial(path)
        if size and not (growing.is_file() and growing.stat().st_size >= size):
            raise UserError(f"{growing} does not hold the {size} bytes that a stopped run wrote")
        self._file = open(growing, "r+b" if size else "wb", buffering=0)
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, data: bytes) -> None:
        """Append bytes; OSError with the path when they cannot be written."""
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
        """Close the file; it keeps its hidden name."""
        self._file.close()

    def blocks(self) -> Iterator[bytes]:
        """The contents, from the beginning."""
        with open(partial(self.path), "rb") as file:
            while block := file.read(4 * BUFFER_BYTES):
                yield block


def write_file(path: Path, fill: Callable[[NewFile], object]) -> dict[str, Any]:
    """Write a file by fill(file) and return its manifest entry {"name", "size", "sha256"}.

    Not atomic by itself: the caller gives the file, or the directory it is in, its name afterwards. OSError with the
    path when it cannot be written.
    """
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


def write_bytes(path: Path, data: bytes) -> None:
    """Create or replace a file atomically; readers never see an incomplete file."""
    temporary = hidden(path, "tmp")
    write_file(temporary, lambda file: file.write(data))
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Create or replace a UTF-8 file atomically."""
    write_bytes(path, text.encode("utf-8"))


def copy_file(source: Path, path: Path) -> None:
    """Copy a small file atomically."""
    write_bytes(path, source.read_bytes())


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a hidden sibling to write; it replaces `path` when the block ends, and is removed after an error.

    For libraries that take a path. The content is not fsynced.
    """
    temporary = partial(path)
    with attach_path(path):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a hidden sibling directory to fill; it replaces `path` when the block ends, and is removed after an error.

    The caller fsyncs the files in it, by `write_file` or `sync_files`. A process that dies leaves hidden directories
    only, which the next call for the same `path` removes.
    """
    temporary = hidden(path, "tmp")
    old = hidden(path, "old")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_folder(temporary)
        if path.exists():
            remove(old)
            os.rename(path, old)
        os.rename(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        remove(temporary)
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    remove(old)


def remove_folder(path: Path) -> None:
    """Delete a directory: rename it first, so that a partly deleted one never has its name."""
    old = hidden(path, "old")
    remove(old)
    os.rename(path, old)
    remove(old)


def remove(directory: Path) -> None:
    """Delete a hidden directory; what cannot be deleted now is deleted the next time."""
    shutil.rmtree(directory, ignore_errors=True)


def hidden(path: Path, kind: str) -> Path:
    """The hidden sibling of a path that is being written ("tmp", "partial") or deleted ("old")."""
    return path.with_name(f".{path.name}.{kind}")


def partial(path: Path) -> Path:
    """The hidden sibling that a file is while it grows."""
    return hidden(path, "partial")


def sync_folder(directory: Path) -> None:
    """Flush the names in a directory to the disk; Windows cannot open directories and does it by itself."""
    if os.name == "nt":
        return
    _fsync(directory, os.O_RDONLY)


def sync_files(directory: Path) -> None:
    """Flush every file below a directory to the disk, for files that a library has written."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            _fsync(path, os.O_RDWR)


def _fsync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def folder_bytes(directory: Path) -> int:
    """The size of all files below a directory in bytes; 0 when it does not exist."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@contextmanager
def attach_path(path: Path) -> Iterator[None]:
    """Add `path` to an OSError of the block that names no file, such as a write to a full disk.

    It also replaces the two paths of a failed copy, of which the first is the source.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or error.filename2 is not None:
            error.filename = str(path)
            error.filename2 = None
        raise
