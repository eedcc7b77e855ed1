"""Token files on disk: a memory-mapped `name.bin` and its side files."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import load_json
from utils.log import warn

SCAN = 1 << 24  # tokens read at a time when document starts are searched


class TokenFile:
    """A memory-mapped `name.bin` with its `.meta.json`, `.docs.npy` and, for chats, `.mask.bin`.

    A .bin without a meta file is read as uint16 with a warning. UserError: the file is missing or damaged, was made
    with another tokenizer, or holds an id beyond the vocabulary.

    make_with: the command that makes such files, for error messages. kind: "pretrain" or "sft"; the meta file must
    agree where it names one.
    """

    def __init__(self, path: str | Path, tokenizer: Any, make_with: str, kind: str = "") -> None:
        self.path = Path(path)
        self.bos_id: int = tokenizer.bos_id
        self.pad_id: int = tokenizer.pad_id
        self.bos_is_unique: bool = tokenizer.bos_is_unique
        self.vocab_size: int = tokenizer.vocab_size
        if not self.path.is_file():
            raise UserError(f"no data file {self.path}: make it with `{make_with}`, or give the path of another")
        stem = self.path.with_suffix("")
        self.meta = self._read_meta(Path(f"{stem}.meta.json"), tokenizer)
        if kind and self.meta.get("kind", kind) != kind:
            raise UserError(
                f"{self.path} was made for {self.meta['kind']}, not for {kind}: make the right one with "
                f"`{make_with}`, or give its path"
            )
        self.tokens = self._map(self.path, np.dtype(self.meta.get("dtype", "uint16")).newbyteorder("<"))
        if self.meta.get("tokens", len(self.tokens)) != len(self.tokens):
            raise UserError(
                f"{self.path} holds {len(self.tokens)} tokens and its meta file lists "
                f"{self.meta['tokens']}: make it again with `{make_with}`"
            )
        if len(self.tokens) < 2:
            raise UserError(f"{self.path} holds no text: make it again with `{make_with}`")
        mask_path, docs_path = Path(f"{stem}.mask.bin"), Path(f"{stem}.docs.npy")
        self.mask = self._map(mask_path, np.dtype(np.uint8)) if mask_path.is_file() else None
        if self.mask is not None and len(self.mask) != len(self.tokens):
            raise UserError(f"{mask_path} and {self.path} differ in length: make them again with `{make_with}`")
        self._docs_path: Path | None = docs_path if docs_path.is_file() else None
        self._starts: np.ndarray | None = None

    def _read_meta(self, path: Path, tokenizer: Any) -> dict[str, Any]:
        if not path.is_file():
            warn(f"{path} is missing: reading {self.path} as uint16, its tokenizer unchecked")
            return {}
        meta = load_json(path, "make the data again")
        if meta.get("dtype", "uint16") not in ("uint16", "uint32"):
            raise UserError(
                f"{path} has the dtype {meta['dtype']}, and only uint16 and uint32 are supported: make the data again"
            )
        if meta.get("tokenizer_fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
            raise UserError(
                f"{self.path} was made with another tokenizer than {tokenizer.path}: "
                "preprocess the data again, or pass the right --tokenizer_path"
            )
        if meta.get("max_id", 0) >= self.vocab_size:
            raise UserError(
                f"{self.path} holds token id {meta['max_id']}, beyond the vocabulary of {self.vocab_size} "
                f"in {tokenizer.path}: preprocess the data again, or pass the right --tokenizer_path"
            )
        return meta

    @staticmethod
    def _map(path: Path, dtype: np.dtype) -> np.ndarray:
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise UserError(f"{path} is cut off in the middle of a token: make it again")
        if not size:
            return np.empty(0, dtype)
        with open(path, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # sequences are shuffled: readahead would fetch 128 KB for each
            view.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(view, dtype)

    @property
    def fingerprint(self) -> str:
        """Identifies the data: the sha256 in the meta file, else name and size."""
        return self.meta.get("sha256") or f"{self.path.name}:{self.path.stat().st_size}"

    def documents(self) -> np.ndarray:
        """Document boundaries, (N + 1,) int64; without a .docs.npy they are searched by the <s> tokens."""
        if self._docs_path is not None:
            try:
                starts = np.load(self._docs_path, allow_pickle=False).astype(np.int64)
            except (OSError, ValueError, EOFError):
                raise UserError(f"{self._docs_path} is not an array of integers: preprocess the data again") from None
        else:
            starts = self._find_starts()
        if not len(starts) or starts[0] != 0:
            starts = np.concatenate([[0], starts])
        if (np.diff(starts) < 0).any() or starts[-1] > len(self.tokens):
            raise UserError(f"{self._docs_path} does not fit {self.path}: preprocess the data again")
        return np.concatenate([starts, [len(self.tokens)]])

    def begins(self, first: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether a document begins at each of `tokens` (N,), which are those from position `first` on; and whether
        the token carries no loss for it.

        Where that token is also the end, or may occur in a text, the starts are read from .docs.npy. Without it, each
        one begins a document and ends the one before, which is learned.
        """
        begins = tokens == self.bos_id
        if self.bos_is_unique:
            return begins, begins
        if self._docs_path is None:
            return begins, np.zeros_like(begins)
        if self._starts is None:
            self._starts = self.documents()[:-1]
        inside = slice(*np.searchsorted(self._starts, (first, first + len(tokens))))
        begins = np.zeros_like(begins)
        begins[self._starts[inside] - first] = True
        return begins, begins

    def _find_starts(self) -> np.ndarray:
        """Positions of the <s> tokens; reads the file in large blocks, because the map has no readahead."""
        found = []
        with open(self.path, "rb") as file:
            for start in range(0, len(self.tokens), SCAN):
                found.append(start + np.flatnonzero(np.fromfile(file, self.tokens.dtype, SCAN) == self.bos_id))
        return np.concatenate(found)

    def read(self, index: slice | np.ndarray) -> np.ndarray:
        """Tokens at `index`, a slice or an array of positions, as int64; UserError for an id beyond the vocabulary."""
        tokens = self.tokens[index].astype(np.int64)
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UserError(
                f"{self.path} holds token id {tokens.max()}, beyond the vocabulary of {self.vocab_size}: "
                "preprocess the data again, or pass the right --tokenizer_path"
            )
        return tokens
