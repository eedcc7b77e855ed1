"""Packing: pieces of many widths into sequences of one capacity, fast for tens of millions of pieces."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Which pieces are in which sequence: those of sequence i are pieces[starts[i] : starts[i + 1]]."""

    pieces: np.ndarray  # (N,) each piece once
    starts: np.ndarray  # (sequences + 1,)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.pieces[self.starts[index] : self.starts[index + 1]]


def one_per_sequence(count: int) -> Packing:
    """No packing: sequence i is piece i."""
    return Packing(np.arange(count), np.arange(count + 1))


def best_fit(widths: np.ndarray, capacity: int) -> Packing:
    """Pack pieces (N,), each 1..capacity wide: the widest first, each into the fullest sequence that it fits.

    Pieces of one width are alike, and so are sequences with the same free space, so full groups are handled at once:
    after a piece its sequence is again the fullest until it is too full, so every sequence of a group takes as many
    pieces as fit. Sequences are grouped by their free space; a bit set holds which groups are not empty.
    Source: "Fewer truncations improve language modeling" (2024), best-fit decreasing.
    """
    narrow: type = np.uint16 if capacity < 1 << 16 else np.int64  # a stable sort of 16 bits is a radix sort
    widest_first = np.argsort((capacity - widths).astype(narrow), kind="stable")
    sequence_of = np.empty(len(widths), np.int32 if len(widths) < 1 << 31 else np.int64)
    waiting: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # free space -> sequences
    nonempty = 0  # the bit set
    sequences = 0
    done = 0
    for width, left in reversed(list(enumerate(np.bincount(widths, minlength=capacity + 1).tolist()))):
        while left:
            fitting = nonempty >> width
            if fitting:
                free = width + (fitting & -fitting).bit_length() - 1
                group = np.concatenate(waiting[free])
                waiting[free] = []
                nonempty &= ~(1 << free)
            else:
                free = capacity
                group = np.arange(sequences, sequences - (-left // (free // width)), dtype=sequence_of.dtype)
                sequences += len(group)
            each = free // width
            full, rest = divmod(min(left, each * len(group)), each)
            taken = np.repeat(group[: full + 1], each)[: full * each + rest]
            sequence_of[widest_first[done : done + len(taken)]] = taken
            for still_free, part in (
                (free - each * width, group[:full]),
                (free - rest * width, group[full : full + bool(rest)]),
                (free, group[full + bool(rest) :]),
            ):
                if len(part):
                    waiting[still_free].append(part)
                    nonempty |= 1 << still_free
            done += len(taken)
            left -= len(taken)
    del widest_first, waiting
    pieces = np.argsort(sequence_of, kind="stable").astype(sequence_of.dtype)
    return Packing(pieces, np.concatenate([[0], np.cumsum(np.bincount(sequence_of, minlength=sequences))]))
