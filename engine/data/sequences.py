"""Token files on disk, and the training rows cut from them.

A row is `input_ids`, `targets` and `doc_ids`, each (T,) int64; targets are already shifted by one and -100 where there
is no loss. Row `i` is a function of the file and `i` alone, and the order of the rows one of (seed, epoch, i) alone,
so where a run stands in its data is a single integer.
"""

import mmap
from pathlib import Path

import numpy as np

from engine.data.packing import best_fit, one_a_row
from utils.errors import UserError
from utils.files import load_json
from utils.log import warn

IGNORE = -100  # a target without loss
PADDING = -1  # the doc_ids of positions that hold no text
SCAN = 1 << 24  # tokens looked at in one go


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
            raise UserError(
                f"{self.path} was made for {self.meta['kind']}, not for {kind}: make the right one with "
                f"`{make_with}`, or give its path"
            )
        self.tokens = self._map(self.path, np.dtype(self.meta.get("dtype", "uint16")).newbyteorder("<"))
        if self.meta.get("tokens", len(self.tokens)) != len(self.tokens):
            raise UserError(
                f"{self.path} holds {len(self.tokens)} tokens and its meta file says "
                f"{self.meta['tokens']}: make it again with `{make_with}`"
            )
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
        meta = load_json(path, "make the data again")
        if meta.get("dtype", "uint16") not in ("uint16", "uint32"):
            raise UserError(
                f"{path} says that tokens are {meta['dtype']}, and they are uint16 or uint32: make the data again"
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
    def _map(path: Path, dtype) -> np.ndarray:
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise UserError(f"{path} is cut off in the middle of a token: make it again")
        if not size:
            return np.empty(0, dtype)
        with open(path, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # rows come in a shuffled order: reading ahead would fetch 128 KB for each
            view.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(view, dtype)

    @property
    def fingerprint(self) -> str:
        """What tells this data from other data: the sha256 of the meta file, else size and name."""
        return self.meta.get("sha256") or f"{self.path.name}:{self.path.stat().st_size}"

    def documents(self) -> np.ndarray:
        """(N + 1,) int64 bounds of the documents; without .docs.npy they are found by the <s> tokens."""
        if self._docs_path is not None:
            try:
                starts = np.load(self._docs_path, allow_pickle=False).astype(np.int64)
            except (OSError, ValueError, EOFError):
                raise UserError(f"{self._docs_path} is no array of numbers: preprocess the data again") from None
        else:
            starts = self._find_starts()
        if not len(starts) or starts[0] != 0:
            starts = np.concatenate([[0], starts])
        if (np.diff(starts) < 0).any() or starts[-1] > len(self.tokens):
            raise UserError(f"{self._docs_path} does not fit {self.path}: preprocess the data again")
        return np.concatenate([starts, [len(self.tokens)]])

    def _find_starts(self) -> np.ndarray:
        """Where the <s> tokens stand; read in large parts and not through the map, which reads nothing ahead."""
        found = []
        with open(self.path, "rb") as file:
            for at in range(0, len(self.tokens), SCAN):
                found.append(at + np.flatnonzero(np.fromfile(file, self.tokens.dtype, SCAN) == self.bos_id))
        return np.concatenate(found)

    def read(self, where) -> np.ndarray:
        """Tokens at `where`, a slice or an array of places, as int64, checked against the vocabulary."""
        tokens = self.tokens[where].astype(np.int64)
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UserError(
                f"{self.path} holds token id {tokens.max()}, beyond the vocabulary of {self.vocab_size}: "
                "preprocess the data again, or pass the right --tokenizer_path"
            )
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
        tokens = self.file.read(slice(index * self.seq_len, (index + 1) * self.seq_len + 1))
        row = empty_row(self.seq_len, self.file.pad_id)
        n = len(tokens) - 1  # shorter than T only in the last row
        row["input_ids"][:n] = tokens[:-1]
        row["targets"][:n] = np.where(tokens[1:] == self.file.bos_id, IGNORE, tokens[1:])
        row["doc_ids"][:n] = np.cumsum(tokens[:-1] == self.file.bos_id)
        return row


class DocumentRows:
    """Rows of whole documents, packed best-fit, or one a row for a model that takes no doc_ids.

    file.mask, where there is one, says which tokens carry loss. `long` decides on a document that does not fit a row:
    "split" into pieces that overlap by one token, so that no target is lost; "drop" leaves it out; "cut" keeps its
    beginning, if that holds a target; "error" raises UserError.
    """

    def __init__(self, file: TokenFile, seq_len: int, pack: bool, long: str = "split"):
        self.file, self.seq_len, self.with_doc_ids, self.policy = file, seq_len, pack, long
        bounds = file.documents()
        starts, widths = bounds[:-1], np.diff(bounds) - 1  # the last token of a document is a target only
        beyond = widths > seq_len
        self.documents, self.too_long, self.dropped = len(starts), int(beyond.sum()), 0
        if self.too_long and long == "error":
            raise UserError(
                f"{self.too_long} documents of {file.path} are longer than --max_seq_len={seq_len}, the "
                f"longest has {widths.max()} tokens: raise it, or choose another --long_rows"
            )
        if self.too_long and long == "split":
            starts, widths = split(starts, widths, seq_len)
        elif self.too_long:
            kept = ~beyond
            if long == "cut":
                for i in np.flatnonzero(beyond):
                    kept[i] = file.mask is None or file.mask[starts[i] + 1 : starts[i] + 1 + seq_len].any()
            self.dropped = int((~kept).sum())
            starts, widths = starts[kept], np.minimum(widths[kept], seq_len)
        if not widths.any():
            raise UserError(f"{file.path} has no document that fits --max_seq_len={seq_len}: raise it")
        self.starts, self.widths = starts[widths > 0], widths[widths > 0].astype(np.int32)  # (N,) of the pieces
        self.packing = best_fit(self.widths, seq_len) if pack else one_a_row(len(self.widths))

    def __len__(self) -> int:
        return len(self.packing)

    def row(self, index: int) -> dict[str, np.ndarray]:
        row, pieces = empty_row(self.seq_len, self.file.pad_id), self.packing[index]
        starts, widths = self.starts[pieces], self.widths[pieces]
        n = widths.sum()
        places = np.arange(n) + np.repeat(starts - (np.cumsum(widths) - widths), widths)  # in the file
        row["input_ids"][:n] = self.file.read(places)
        row["targets"][:n] = self.file.read(places + 1)
        if self.file.mask is not None:
            row["targets"][:n][self.file.mask[places + 1] == 0] = IGNORE
        row["doc_ids"][:n] = np.repeat(np.arange(len(pieces)), widths)
        return row

    def summary(self) -> str:
        """How full the rows are and what became of the long documents, in one line."""
        fill = self.widths.sum(dtype=np.int64) / (len(self) * self.seq_len)
        what = "documents" if self.file.mask is None else "conversations"
        text = f"{self.file.path}: {self.documents} {what}, {len(self)} rows of {self.seq_len} tokens, {fill:.1%} full"
        if self.too_long and self.policy == "split":
            text += f"; {self.too_long} longer than a row are continued in another"
        elif self.too_long:
            cut = self.too_long - self.dropped
            fates = [f"{cut} cut"] * bool(cut) + [f"{self.dropped} left out"] * bool(self.dropped)
            text += f"; {self.too_long} longer than a row: {', '.join(fates)}"
        return text

    def openings(self, count: int) -> list[list[int]]:
        """Token ids to generate from: of the first documents, the request (chats) or the first third (texts)."""
        bounds, found = self.file.documents(), []
        for start, end in zip(bounds[:count], bounds[1 : count + 1]):
            if self.file.mask is None:
                cut = min(24, max(2, (end - start) // 3), self.seq_len // 2)
            else:
                cut = int(np.argmax(self.file.mask[start:end])) or 2
            if 0 < cut < self.seq_len:
                found.append(self.file.read(slice(start, start + cut)).tolist())
        return found


def empty_row(seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """A row of padding: no loss, and of no document."""
    return {
        "input_ids": np.full(seq_len, pad_id, np.int64),
        "targets": np.full(seq_len, IGNORE, np.int64),
        "doc_ids": np.full(seq_len, PADDING, np.int64),
    }


def split(starts: np.ndarray, widths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents (N,) into pieces of seq_len inputs at most; the last target of one is the next one's input."""
    pieces = np.maximum(1, -(-widths // seq_len))
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return (
        np.repeat(starts, pieces) + within * seq_len,
        np.minimum(np.repeat(widths, pieces) - within * seq_len, seq_len),
    )


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
