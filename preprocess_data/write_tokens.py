"""Token files: `name.bin` with its `name.meta.json` and `name.docs.npy`, complete under their names or not there.

Written to hidden siblings, checked, then renamed; the meta file last, since it vouches for the others.
"""

import hashlib
import json
import os
from array import array
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.tokenizer import Tokenizer


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16, or uint32 when the vocabulary does not fit."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class TokenWriter:
    """One token file in the making: `add` blocks of documents, then `finish`. As a context it cleans up on an error.

    mask: also write `name.mask.bin`, one uint8 a token, 1 where the token carries loss as a target.
    """

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, mask: bool = False):
        self.folder, self.name, self.tokenizer = folder, name, tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.tokens = self.characters = 0
        self.max_id = -1
        self.starts = array("Q")
        self.sha256 = hashlib.sha256()
        folder.mkdir(parents=True, exist_ok=True)
        self._bin = open(self._partial(".bin"), "wb")
        self._mask = open(self._partial(".mask.bin"), "wb") if mask else None

    def _partial(self, suffix: str) -> Path:
        return self.folder / f".{self.name}{suffix}.partial"

    def add(self, tokens: np.ndarray, lengths: np.ndarray, characters: int, mask: np.ndarray | None = None) -> None:
        """Append whole documents: their tokens one after another, (N,), the length of each, and their characters."""
        if not len(tokens):
            return
        self.max_id = max(self.max_id, int(tokens.max()))
        data = tokens.astype(self.dtype).tobytes()
        self._bin.write(data)
        self.sha256.update(data)
        if self._mask is not None:
            self._mask.write(mask.astype(np.uint8).tobytes())
        ends = self.tokens + np.cumsum(lengths, dtype=np.uint64)
        self.starts.frombytes((ends - lengths.astype(np.uint64)).tobytes())
        self.tokens += len(tokens)
        self.characters += characters

    def finish(self, **meta) -> dict:
        """Check the files, give them their names, and return the meta that was written."""
        files = [file for file in (self._bin, self._mask) if file is not None]
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        np.save(open(self._partial(".docs.npy"), "wb"), np.frombuffer(self.starts, dtype="<u8"))
        size = self._partial(".bin").stat().st_size
        if size != self.tokens * self.dtype.itemsize or self.max_id >= self.tokenizer.vocab_size:
            raise UserError(
                f"{self.name}.bin came out wrong ({size} bytes for {self.tokens} tokens, largest id "
                f"{self.max_id}): is the disk full?"
            )
        meta = {
            "dtype": self.dtype.name,
            "tokens": self.tokens,
            "documents": len(self.starts),
            "characters": self.characters,
            "vocab_size": self.tokenizer.vocab_size,
            "max_id": self.max_id,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "sha256": self.sha256.hexdigest(),
            **meta,
        }
        self._partial(".meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        (self.folder / f"{self.name}.meta.json").unlink(missing_ok=True)
        for suffix in (".bin", ".mask.bin", ".docs.npy", ".meta.json"):
            if self._partial(suffix).exists():
                os.replace(self._partial(suffix), self.folder / f"{self.name}{suffix}")
        return meta

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        for file in filter(None, (self._bin, self._mask)):
            file.close()
        for suffix in (".bin", ".mask.bin", ".docs.npy", ".meta.json"):
            self._partial(suffix).unlink(missing_ok=True)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write rows beside the file, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
