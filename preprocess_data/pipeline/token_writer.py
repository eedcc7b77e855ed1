"""Token files: `name.bin` with its `name.meta.json` and `name.docs.npy`, complete under their names or not there.

They grow as hidden siblings, `.name.bin.partial`, of which a kill leaves what was synced last; the same command resumes
from there. They are renamed at the end, the meta file last, because it marks them as complete.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from utils.atomic import GrowingFile
from utils.errors import UserError
from utils.tokenizer import Tokenizer


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16, or uint32 when the vocabulary does not fit."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class TokenWriter:
    """Writes one token file: `add` documents, then `finish`; the caller renames the files.

    mask: also write `name.mask.bin`, one uint8 per token, 1 where the token carries loss as a target. state: what
    `sync` returned, to resume from there.
    """

    def __init__(
        self, folder: Path, name: str, tokenizer: Tokenizer, mask: bool = False, state: dict[str, int] | None = None
    ) -> None:
        self.folder = folder
        self.name = name
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.state = state or {"tokens": 0, "documents": 0, "characters": 0, "max_id": -1}
        folder.mkdir(parents=True, exist_ok=True)
        tokens = self.state["tokens"]
        self._bin = GrowingFile(folder / f"{name}.bin", tokens * self.dtype.itemsize)
        self._starts = GrowingFile(folder / f"{name}.starts", self.state["documents"] * 8)
        self._mask = GrowingFile(folder / f"{name}.mask.bin", tokens) if mask else None
        self.sha256 = hashlib.sha256()
        for block in self._bin.blocks():
            self.sha256.update(block)

    @property
    def tokens(self) -> int:
        return self.state["tokens"]

    def add(self, tokens: np.ndarray, lengths: np.ndarray, characters: int, mask: np.ndarray | None = None) -> None:
        """Append documents: their tokens concatenated, (N,), the length of each, (D,), and their characters in all."""
        if not len(tokens):
            return
        data = tokens.astype(self.dtype, copy=False).tobytes()
        self._bin.write(data)
        self.sha256.update(data)
        if self._mask is not None:
            assert mask is not None
            self._mask.write(mask.astype(np.uint8, copy=False).tobytes())
        ends = self.tokens + np.cumsum(lengths, dtype=np.uint64)
        self._starts.write((ends - lengths.astype(np.uint64)).astype("<u8").tobytes())
        self.state = {
            "tokens": self.tokens + len(tokens),
            "documents": self.state["documents"] + len(lengths),
            "characters": self.state["characters"] + int(characters),
            "max_id": max(self.state["max_id"], int(tokens.max())),
        }

    def sync(self) -> dict[str, int]:
        """Flush everything to the disk; returns the state to resume from."""
        for file in self._files():
            file.sync()
        return self.state

    def finish(self, **meta: Any) -> dict[str, Any]:
        """Verify the files, write `docs.npy` and `meta.json` next to them, and return the meta; all still hidden."""
        self.sync()
        size = self._bin.sync()
        if size != self.tokens * self.dtype.itemsize or self.state["max_id"] >= self.tokenizer.vocab_size:
            raise UserError(
                f"{self.name}.bin is wrong ({size} bytes for {self.tokens} tokens, largest id "
                f"{self.state['max_id']}): report this"
            )
        self._write_docs()
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

    def _write_docs(self) -> None:
        docs = GrowingFile(self.folder / f"{self.name}.docs.npy")
        header = {"descr": "<u8", "fortran_order": False, "shape": (self.state["documents"],)}
        np.lib.format.write_array_header_1_0(docs, header)
        for block in self._starts.blocks():
            docs.write(block)
        docs.sync()
        docs.close()

    def close(self) -> None:
        for file in self._files():
            file.close()

    def _files(self) -> list[GrowingFile]:
        return [file for file in (self._bin, self._starts, self._mask) if file is not None]
