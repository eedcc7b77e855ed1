"""Training sequences cut from a token file: fixed windows, or complete documents packed together.

A sequence is `input_ids`, `targets` and `doc_ids`, each (T,) int64. Targets are already shifted by one, and -100 where
there is no loss. Sequence `i` is a function of the file and `i` alone, and the order of the sequences a function of
(seed, epoch, i) alone, so the position of a run in its data is one integer.
"""

from typing import Protocol

import numpy as np

from engine.data.packing import best_fit, one_per_sequence
from engine.data.token_file import TokenFile
from utils.errors import UserError

IGNORE = -100  # a target without loss
PADDING = -1  # the doc_ids of padding


class Sequences(Protocol):
    """What the loader, the loop and the evaluation need of a data set.

    with_doc_ids: whether a batch holds doc_ids. file: where the tokens are from.
    """

    file: TokenFile
    seq_len: int
    with_doc_ids: bool

    def __len__(self) -> int: ...

    def sequence(self, index: int) -> dict[str, np.ndarray]:
        """Sequence `index`: input_ids, targets and doc_ids, each (T,) int64."""


class WindowSequences:
    """Windows of T + 1 tokens that overlap by one, so that every token of the file is a target once per epoch.

    The <s> of the next document is not a target: nothing is predicted across a document's end.
    """

    def __init__(self, file: TokenFile, seq_len: int) -> None:
        self.file = file
        self.seq_len = seq_len
        self.with_doc_ids = True

    def __len__(self) -> int:
        return -(-(len(self.file.tokens) - 1) // self.seq_len)

    def sequence(self, index: int) -> dict[str, np.ndarray]:
        first = index * self.seq_len
        tokens = self.file.read(slice(first, first + self.seq_len + 1))
        begins, no_loss = self.file.begins(first, tokens)
        sequence = empty_sequence(self.seq_len, self.file.pad_id)
        n = len(tokens) - 1  # shorter than T only in the last sequence
        sequence["input_ids"][:n] = tokens[:-1]
        sequence["targets"][:n] = np.where(no_loss[1:], IGNORE, tokens[1:])
        sequence["doc_ids"][:n] = np.cumsum(begins[:-1])
        return sequence


class DocumentSequences:
    """Sequences of complete documents, packed best-fit; one document each for a model that does not take doc_ids.

    file.mask, where there is one, marks the tokens that carry loss. `long` is the policy for a document that does not
    fit a sequence: "split" into pieces that overlap by one token, so that no target is lost; "drop" it; "cut" keeps its
    beginning, if that holds a target; "error" raises UserError.
    """

    def __init__(self, file: TokenFile, seq_len: int, pack: bool, long: str = "split") -> None:
        self.file = file
        self.seq_len = seq_len
        self.with_doc_ids = pack
        self.policy = long
        bounds = file.documents()
        starts = bounds[:-1]
        widths = np.diff(bounds) - 1  # the last token of a document is a target only
        too_long = widths > seq_len
        self.documents = len(starts)
        self.too_long = int(too_long.sum())
        self.dropped = 0
        if self.too_long and long == "error":
            raise UserError(
                f"{self.too_long} documents of {file.path} are longer than --max_seq_len={seq_len}, the "
                f"longest has {widths.max()} tokens: raise it, or choose another --long_rows"
            )
        if self.too_long and long == "split":
            starts, widths = split(starts, widths, seq_len)
        elif self.too_long:
            kept = ~too_long
            if long == "cut":
                for i in np.flatnonzero(too_long):
                    kept[i] = file.mask is None or file.mask[starts[i] + 1 : starts[i] + 1 + seq_len].any()
            self.dropped = int((~kept).sum())
            starts = starts[kept]
            widths = np.minimum(widths[kept], seq_len)
        if not widths.any():
            raise UserError(f"{file.path} has no document that fits --max_seq_len={seq_len}: raise it")
        self.starts = starts[widths > 0]  # (N,) of the pieces
        self.widths = widths[widths > 0].astype(np.int32)  # (N,)
        self.packing = best_fit(self.widths, seq_len) if pack else one_per_sequence(len(self.widths))

    def __len__(self) -> int:
        return len(self.packing)

    def sequence(self, index: int) -> dict[str, np.ndarray]:
        sequence = empty_sequence(self.seq_len, self.file.pad_id)
        pieces = self.packing[index]
        starts = self.starts[pieces]
        widths = self.widths[pieces]
        n = widths.sum()
        positions = np.arange(n) + np.repeat(starts - (np.cumsum(widths) - widths), widths)  # in the file
        sequence["input_ids"][:n] = self.file.read(positions)
        sequence["targets"][:n] = self.file.read(positions + 1)
        if self.file.mask is not None:
            sequence["targets"][:n][self.file.mask[positions + 1] == 0] = IGNORE
        sequence["doc_ids"][:n] = np.repeat(np.arange(len(pieces)), widths)
        return sequence

    def summary(self) -> str:
        """One line: the number of sequences, how full they are, and what was done with the long documents."""
        fill = self.widths.sum(dtype=np.int64) / (len(self) * self.seq_len)
        what = "documents" if self.file.mask is None else "conversations"
        text = (
            f"{self.file.path}: {self.documents} {what}, {len(self)} sequences of {self.seq_len} tokens, "
            f"{fill:.1%} full"
        )
        if self.too_long and self.policy == "split":
            text += f"; {self.too_long} longer than a sequence are split"
        elif self.too_long:
            cut = self.too_long - self.dropped
            fates = [f"{cut} cut"] * bool(cut) + [f"{self.dropped} dropped"] * bool(self.dropped)
            text += f"; {self.too_long} longer than a sequence: {', '.join(fates)}"
        return text

    def prompts(self, count: int) -> list[list[int]]:
        """Token ids to generate from: the request (chats) or the first third (texts) of the first `count` documents."""
        bounds = self.file.documents()
        found = []
        for start, end in zip(bounds[:count], bounds[1 : count + 1]):
            if self.file.mask is None:
                cut = min(24, max(2, (end - start) // 3), self.seq_len // 2)
            else:
                cut = int(np.argmax(self.file.mask[start:end])) or 2
            if 0 < cut < self.seq_len:
                found.append(self.file.read(slice(start, start + cut)).tolist())
        return found


def empty_sequence(seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """A sequence of padding alone: no loss, no document."""
    return {
        "input_ids": np.full(seq_len, pad_id, np.int64),
        "targets": np.full(seq_len, IGNORE, np.int64),
        "doc_ids": np.full(seq_len, PADDING, np.int64),
    }


def split(starts: np.ndarray, widths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents (N,) into pieces of at most seq_len inputs; the last target of a piece is the next one's input."""
    pieces = np.maximum(1, -(-widths // seq_len))
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return (
        np.repeat(starts, pieces) + within * seq_len,
        np.minimum(np.repeat(widths, pieces) - within * seq_len, seq_len),
    )
