"""Token files: `name.bin` with its `name.meta.json` and `name.docs.npy`, complete under their names or not there.

They grow as hidden siblings, `.name.bin.partial`, of which a kill leaves as much as was synced last; a run of the same
command goes on from there. Renamed at the end, the meta file last, since it vouches for the others.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils.atomic import atomic_write, attach_path
from utils.errors import UserError
from utils.tokenizer import Tokenizer

READ = 1 << 22


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16, or uint32 when the vocabulary does not fit."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def partial(path: Path) -> Path:
    """The hidden sibling that a file is while it grows."""
    return path.with_name(f".{path.name}.partial")


class GrowingFile:
    """The hidden sibling of `path`, open to append. `size` is what is kept of one that is there already."""

    def __init__(self, path: Path, size: int = 0):
        self.path = path
        if size and not (partial(path).is_file() and partial(path).stat().st_size >= size):
            raise UserError(
                f"{partial(path)} is not what the stopped run left: delete .{path.name.split('_')[0]}_progress.json "
                "beside it to begin anew"
            )
        self._file = open(partial(path), "r+b" if size else "wb", buffering=0)
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, data: bytes) -> None:
        data = memoryview(data).cast("B")
        with attach_path(self.path):
            while data:
                data = data[self._file.write(data) :]

    def sync(self) -> int:
        """Everything is on the disk; returns the size."""
        with attach_path(self.path):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def blocks(self) -> Iterator[bytes]:
        """What is in the file, from its beginning."""
        with open(partial(self.path), "rb") as file:
            while block := file.read(READ):
                yield block


class TokenWriter:
    """One token file in the making: `add` blocks of documents, then `finish` and `publish`.

    mask: also write `name.mask.bin`, one uint8 a token, 1 where the token carries loss as a target. state: what `sync`
    returned, to go on from there.
    """

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, mask: bool = False, state: dict | None = None):
        self.folder, self.name, self.tokenizer = folder, name, tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.state = state or {"tokens": 0, "documents": 0, "characters": 0, "max_id": -1}
        folder.mkdir(parents=True, exist_ok=True)
        tokens, documents = self.state["tokens"], self.state["documents"]
        self._bin = GrowingFile(folder / f"{name}.bin", tokens * self.dtype.itemsize)
        self._starts = GrowingFile(folder / f"{name}.starts", documents * 8)
        self._mask = GrowingFile(folder / f"{name}.mask.bin", tokens) if mask else None
        self.sha256 = hashlib.sha256()
        for block in self._bin.blocks():
            self.sha256.update(block)

    @property
    def tokens(self) -> int:
        return self.state["tokens"]

    def add(self, tokens: np.ndarray, lengths: np.ndarray, characters: int, mask: np.ndarray | None = None) -> None:
        """Append whole documents: their tokens one after another, (N,), the length of each, and their characters."""
        if not len(tokens):
            return
        data = tokens.astype(self.dtype, copy=False).tobytes()
        self._bin.write(data)
        self.sha256.update(data)
        if self._mask is not None:
            self._mask.write(mask.astype(np.uint8, copy=False).tobytes())
        ends = self.tokens + np.cumsum(lengths, dtype=np.uint64)
        self._starts.write((ends - lengths.astype(np.uint64)).astype("<u8").tobytes())
        self.state = {
            "tokens": self.tokens + len(tokens),
            "documents": self.state["documents"] + len(lengths),
            "characters": self.state["characters"] + int(characters),
            "max_id": max(self.state["max_id"], int(tokens.max())),
        }

    def sync(self) -> dict:
        """Everything is on the disk; returns what it takes to go on from here."""
        for file in filter(None, (self._bin, self._starts, self._mask)):
            file.sync()
        return self.state

    def finish(self, **meta) -> dict:
        """Check the files, write the two beside them, and return the meta; they have their hidden names still."""
        self.sync()
        size, expected = self._bin.sync(), self.tokens * self.dtype.itemsize
        if size != expected or self.state["max_id"] >= self.tokenizer.vocab_size:
            raise UserError(
                f"{self.name}.bin came out wrong ({size} bytes for {self.tokens} tokens, largest id "
                f"{self.state['max_id']}): report this"
            )
        docs = GrowingFile(self.folder / f"{self.name}.docs.npy")
        header = {"descr": "<u8", "fortran_order": False, "shape": (self.state["documents"],)}
        np.lib.format.write_array_header_1_0(docs, header)
        for block in self._starts.blocks():
            docs.write(block)
        docs.sync()
        docs.close()
        meta = {
            "dtype": self.dtype.name,
            **{key: self.state[key] for key in ("tokens", "documents", "characters")},
            "vocab_size": self.tokenizer.vocab_size,
            "max_id": self.state["max_id"],
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "sha256": self.sha256.hexdigest(),
            **meta,
        }
        file = GrowingFile(self.folder / f"{self.name}.meta.json")
        file.write((json.dumps(meta, ensure_ascii=False, indent=2) + "\n").encode())
        file.sync()
        file.close()
        self.close()
        return meta

    def close(self) -> None:
        for file in filter(None, (self._bin, self._starts, self._mask)):
            file.close()


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the file, sync, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as beside, open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write rows beside the file, then rename."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
