"""Packing: pieces of many widths into rows of one capacity, for tens of millions of pieces."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Which pieces stand in which row: those of row i are pieces[starts[i] : starts[i + 1]]."""

    pieces: np.ndarray  # (N,) each piece once
    starts: np.ndarray  # (rows + 1,)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.pieces[self.starts[row] : self.starts[row + 1]]


def one_a_row(count: int) -> Packing:
    """No packing: row i is piece i."""
    return Packing(np.arange(count), np.arange(count + 1))


def best_fit(widths: np.ndarray, capacity: int) -> Packing:
    """Pack pieces (N,), each 1..capacity wide: the widest first, each into the fullest row that still takes it.

    Pieces of one width, and rows with one number of free places, are alike, so whole groups are dealt with at once:
    after a piece its row is the fullest again until it is too full, so that every row of the group takes as many as go
    into it. Rows wait in a group for each number of free places; a bit set holds which groups are not empty.
    Source: "Fewer truncations improve language modeling" (2024), best-fit decreasing.
    """
    narrow = np.uint16 if capacity < 1 << 16 else np.int64  # a stable sort of 16 bits is a radix sort
    widest_first = np.argsort((capacity - widths).astype(narrow), kind="stable")
    row_of = np.empty(len(widths), np.int32 if len(widths) < 1 << 31 else np.int64)
    waiting: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # free places -> rows
    groups = rows = done = 0
    for width, left in reversed(list(enumerate(np.bincount(widths, minlength=capacity + 1).tolist()))):
        while left:
            fitting = groups >> width
            if fitting:
                free = width + (fitting & -fitting).bit_length() - 1
                group = np.concatenate(waiting[free])
                waiting[free], groups = [], groups & ~(1 << free)
            else:
                free = capacity
                group = np.arange(rows, rows - (-left // (free // width)), dtype=row_of.dtype)
                rows += len(group)
            each = free // width
            full, rest = divmod(min(left, each * len(group)), each)
            taken = np.repeat(group[: full + 1], each)[: full * each + rest]
            row_of[widest_first[done : done + len(taken)]] = taken
            for still_free, part in (
                (free - each * width, group[:full]),
                (free - rest * width, group[full : full + bool(rest)]),
                (free, group[full + bool(rest) :]),
            ):
                if len(part):
                    waiting[still_free].append(part)
                    groups |= 1 << still_free
            done, left = done + len(taken), left - len(taken)
    del widest_first, waiting
    pieces = np.argsort(row_of, kind="stable").astype(row_of.dtype)
    return Packing(pieces, np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))]))
