"""Token files on disk, and the training rows cut from them.

A row is `input_ids`, `targets` and `doc_ids`, each (T,) int64; targets are already shifted by one and -100 where there
is no loss. Row `i` is a function of the file and `i` alone, and the order of the rows one of (seed, epoch, i) alone,
so where a run stands in its data is a single integer.
"""

import json
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.log import warn

IGNORE = -100  # a target without loss


class TokenFile:
    """A memory-mapped `name.bin` with its `.meta.json`, `.docs.npy` and, for chats, `.mask.bin`.

    A .bin without meta file is read as uint16 with a warning. Raises UserError when the file is missing or damaged, was
    made with another tokenizer, or holds an id beyond the vocabulary.
    """

    def __init__(self, path, tokenizer, make_with: str, kind: str = ""):
        self.path, self.bos_id, self.pad_id = Path(path), tokenizer.bos_id, tokenizer.pad_id
        self.vocab_size = tokenizer.vocab_size
        if not self.path.is_file():
            raise UserError(f"no data file {self.path}: make it with `{make_with}`, or give the path of another")
        stem = self.path.with_suffix("")
        self.meta = self._read_meta(Path(f"{stem}.meta.json"), tokenizer)
        if kind and self.meta.get("kind", kind) != kind:
            raise UserError(f"{self.path} was made for {self.meta['kind']}, not for {kind}: make the right one with "
                            f"`{make_with}`, or give its path")
        self.tokens = self._map(self.path, np.dtype(self.meta.get("dtype", "uint16")).newbyteorder("<"))
        if self.meta.get("tokens", len(self.tokens)) != len(self.tokens):
            raise UserError(f"{self.path} holds {len(self.tokens)} tokens and its meta file says "
                            f"{self.meta['tokens']}: make it again with `{make_with}`")
        if len(self.tokens) < 2:
            raise UserError(f"{self.path} holds no text: make it again with `{make_with}`")
        mask_path, docs_path = Path(f"{stem}.mask.bin"), Path(f"{stem}.docs.npy")
        self.mask = self._map(mask_path, np.dtype(np.uint8)) if mask_path.is_file() else None
        if self.mask is not None and len(self.mask) != len(self.tokens):
            raise UserError(f"{mask_path} and {self.path} differ in length: make them again with `{make_with}`")
        self._docs_path = docs_path if docs_path.is_file() else None

    def _read_meta(self, path: Path, tokenizer) -> dict:
        if not path.is_file():
            warn(f"{path} is missing: reading {self.path} as uint16, its tokenizer unchecked")
            return {}
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path} is no valid JSON: make the data again") from None
        if meta.get("tokenizer_fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
            raise UserError(f"{self.path} was made with another tokenizer than {tokenizer.path}: "
                            "preprocess the data again, or pass the right --tokenizer_path")
        if meta.get("max_id", 0) >= self.vocab_size:
            raise UserError(f"{self.path} holds token id {meta['max_id']}, beyond the vocabulary of {self.vocab_size} "
                            f"in {tokenizer.path}: preprocess the data again, or pass the right --tokenizer_path")
        return meta

    @staticmethod
    def _map(path: Path, dtype) -> np.ndarray:
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise UserError(f"{path} is cut off in the middle of a token: make it again")
        return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype)

    @property
    def fingerprint(self) -> str:
        """What tells this data from other data: the sha256 of the meta file, else size and name."""
        return self.meta.get("sha256") or f"{self.path.name}:{self.path.stat().st_size}"

    def documents(self) -> np.ndarray:
        """(N + 1,) int64 bounds of the documents; without .docs.npy they are found by the <s> tokens."""
        if self._docs_path is not None:
            starts = np.load(self._docs_path, allow_pickle=False).astype(np.int64)
        else:
            starts = np.flatnonzero(np.asarray(self.tokens) == self.bos_id)
        if not len(starts) or starts[0] != 0:
            starts = np.concatenate([[0], starts])
        if (np.diff(starts) < 0).any() or starts[-1] > len(self.tokens):
            raise UserError(f"{self._docs_path} does not fit {self.path}: preprocess the data again")
        return np.concatenate([starts, [len(self.tokens)]])

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens start..end as int64, checked against the vocabulary."""
        tokens = self.tokens[start:end].astype(np.int64)
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UserError(f"{self.path} holds token id {tokens.max()}, beyond the vocabulary of {self.vocab_size}: "
                            "preprocess the data again, or pass the right --tokenizer_path")
        return tokens


class WindowRows:
    """Windows of T + 1 tokens that overlap by one, so that every token of the file is a target once an epoch.

    Nothing is predicted across a document's end: the <s> that follows is no target.
    """

    def __init__(self, file: TokenFile, seq_len: int):
        self.file, self.seq_len = file, seq_len
        self.with_doc_ids = True

    def __len__(self) -> int:
        return -(-(len(self.file.tokens) - 1) // self.seq_len)

    def row(self, index: int) -> dict[str, np.ndarray]:
        tokens = self.file.read(index * self.seq_len, (index + 1) * self.seq_len + 1)
        row = empty_row(self.seq_len, self.file.pad_id)
        n = len(tokens) - 1  # shorter than T only in the last row
        row["input_ids"][:n] = tokens[:-1]
        row["targets"][:n] = np.where(tokens[1:] == self.file.bos_id, IGNORE, tokens[1:])
        row["doc_ids"][:n] = np.cumsum(tokens[:-1] == self.file.bos_id)
        row["doc_ids"][n:] = self.seq_len + 1
        return row


class DocumentRows:
    """Rows of whole documents, packed best-fit, or one a row for a model that takes no doc_ids.

    file.mask, where there is one, says which tokens carry loss. A document that does not fit a row is cut into pieces
    that overlap by one token, or with `drop_long` left out and counted in `dropped`.
    Source of the packing: "Fewer truncations improve language modeling" (2024), best-fit decreasing.
    """

    def __init__(self, file: TokenFile, seq_len: int, pack: bool, drop_long: bool = False):
        self.file, self.seq_len, self.with_doc_ids = file, seq_len, pack
        bounds = file.documents()
        starts, widths = bounds[:-1], np.diff(bounds) - 1  # the last token of a document is a target only
        long = widths > seq_len
        self.dropped = int(long.sum()) if drop_long else 0
        if drop_long:
            starts, widths = starts[~long], widths[~long]
        elif long.any():
            pieces = np.maximum(1, -(-widths // seq_len))
            within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            starts = np.repeat(starts, pieces) + within * seq_len
            widths = np.minimum(np.repeat(widths, pieces) - within * seq_len, seq_len)
        starts, widths = starts[widths > 0], widths[widths > 0]
        if not len(starts):
            raise UserError(f"{file.path} has no document that fits --max_seq_len={seq_len}: raise it")
        self.pieces = np.stack([starts, widths], axis=1)  # (N, 2)
        self.members = best_fit(widths, seq_len) if pack else [[i] for i in range(len(widths))]

    def __len__(self) -> int:
        return len(self.members)

    def row(self, index: int) -> dict[str, np.ndarray]:
        row, at = empty_row(self.seq_len, self.file.pad_id), 0
        for number, piece in enumerate(self.members[index]):
            start, n = map(int, self.pieces[piece])
            tokens, targets = self.file.read(start, start + n + 1), slice(at, at + n)
            row["input_ids"][targets] = tokens[:-1]
            row["targets"][targets] = tokens[1:]
            if self.file.mask is not None:
                row["targets"][targets][self.file.mask[start + 1 : start + n + 1] == 0] = IGNORE
            row["doc_ids"][targets] = number
            at += n
        row["doc_ids"][at:] = len(self.members[index])  # padding is a document of its own
        return row

    def targets_per_character(self) -> float | None:
        """Targets of the file for each character of text behind them, to turn nats a target into bits a character."""
        if not self.file.meta.get("characters"):
            return None
        starts = self.file.documents()[:-1]
        if self.file.mask is None:
            targets = len(self.file.tokens) - len(starts)  # the first token of a document is no target
        else:
            targets = int(np.count_nonzero(self.file.mask)) - int(np.count_nonzero(self.file.mask[starts]))
        return targets / self.file.meta["characters"]

    def openings(self, count: int) -> list[list[int]]:
        """Token ids to generate from: of the first documents, the request (chats) or the first third (texts)."""
        bounds, found = self.file.documents(), []
        for start, end in zip(bounds[:count], bounds[1 : count + 1]):
            if self.file.mask is None:
                cut = min(24, max(2, (end - start) // 3), self.seq_len // 2)
            else:
                cut = int(np.argmax(self.file.mask[start:end])) or 2
            if 0 < cut < self.seq_len:
                found.append(self.file.read(int(start), int(start + cut)).tolist())
        return found


def empty_row(seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """A row of padding without loss."""
    return {"input_ids": np.full(seq_len, pad_id, np.int64), "targets": np.full(seq_len, IGNORE, np.int64),
            "doc_ids": np.zeros(seq_len, np.int64)}


def best_fit(widths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack pieces into rows: the widest first, each into the fullest row that still takes it.

    Rows wait in one list for each number of free places, and a heap-free scan is avoided by keeping the non-empty
    sizes in a bit set: the lowest set bit at or above a width is the best fit.
    """
    rows: list[list[int]] = []
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]  # free places -> rows
    sizes = 0
    for piece in np.argsort(-widths, kind="stable").tolist():
        width = int(widths[piece])
        fitting = sizes >> width
        if fitting:
            free = width + (fitting & -fitting).bit_length() - 1
            row = waiting[free].pop()
            if not waiting[free]:
                sizes &= ~(1 << free)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        waiting[free - width].append(row)
        sizes |= 1 << (free - width)
    return rows


def shuffled(position: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where `position` (int64 array, 0..n-1) stands in the shuffle of an epoch: a permutation that is never stored.

    Four Feistel rounds over the smallest even number of bits that holds n; a value that lands at n or above goes round
    again (cycle walking), which keeps it a permutation of 0..n-1.
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(4, np.uint64)
    value, out = position.astype(np.uint64), np.empty(len(position), np.uint64)
    open_places = np.arange(len(position))
    while len(open_places):
        left, right = value >> np.uint64(half), value & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        value = (left << np.uint64(half)) | right
        inside = value < n
        out[open_places[inside]] = value[inside]
        open_places, value = open_places[~inside], value[~inside]
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
