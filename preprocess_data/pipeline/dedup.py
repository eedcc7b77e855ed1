"""Deduplication: exact duplicates, and near duplicates, which share most of their text with an earlier document.

Workers compute the signature of a document, which is pure and small. One process decides in the order of the
documents, so the first of several is kept whatever the number of workers.
"""

import hashlib
import re
from array import array
from bisect import bisect_left

import numpy as np
import rensa

from preprocess_data.pipeline.chunks import EncodedChunk
from utils.text import HAN

KINDS = ("exact", "near")
# Near: MinHash over all 5-grams of words, as in FineWeb (Penedo et al. 2024): documents that agree in all 8 values of
# any of 14 bands are duplicates. For a Jaccard similarity s of the sets of 5-grams the probability is
# 1 - (1 - s**8)**14: 0.05 at 0.5, 0.56 at 0.7, 0.77 at 0.75, 0.92 at 0.8, 0.9996 at 0.9.
BANDS = 14
ROWS = 8  # hash values per band
SHINGLE = 5
SEED = 1
_KANA = "\u3040-\u30ff"
_WORD = re.compile(f"[{HAN}{_KANA}]|[^\\W_{HAN}{_KANA}]+")  # a character of Chinese or kana is a word
# The key of a band is a random linear form of its values modulo 2**64, another one per band: different bands have the
# same key with a probability of about 2**-63.
_FACTORS = np.random.Generator(np.random.PCG64(SEED)).integers(0, 2**64, (BANDS, 1 + ROWS), np.uint64) | np.uint64(1)


def signature(text: str, kind: str) -> bytes:
    """What Dedup needs to know of a cleaned text: 8 bytes for exact, 120 for near. Pure."""
    exact = hashlib.blake2b(text.encode(), digest_size=8).digest()
    words = _WORD.findall(text.lower()) if kind == "near" else []
    if not words:  # without words there is only the exact hash
        return exact
    minhash = rensa.RMinHash(BANDS * ROWS, SEED)
    minhash.update([" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))])
    values = np.array(minhash.digest(), np.uint64).reshape(BANDS, ROWS)
    bands = _FACTORS[:, 0] + (_FACTORS[:, 1:] * values).sum(axis=1, dtype=np.uint64)
    return exact + bands.astype("<u8").tobytes()


def drop_duplicates(chunk: EncodedChunk, seen: "Dedup") -> list[bytes]:
    """Remove duplicates of earlier documents from a chunk, in the order of the input; returns the kept signatures."""
    order = sorted(
        (position, split, i)
        for split, documents in chunk.splits.items()
        for i, position in enumerate(documents.positions.tolist())
    )
    keep = {split: np.ones(len(documents.lengths), bool) for split, documents in chunk.splits.items()}
    kept = []
    for _, split, i in order:
        candidate = chunk.splits[split].signatures[i]
        if reason := seen.reason(candidate):
            keep[split][i] = False
            chunk.filtered[reason] += 1
        else:
            kept.append(candidate)
    chunk.splits = {split: documents.select(keep[split]) for split, documents in chunk.splits.items()}
    return kept


class Dedup:
    """The documents seen so far. Memory: 8 bytes per kept document for exact, 120 for near, plus 0.1 GB."""

    def __init__(self) -> None:
        self._seen = IntSet()

    def reason(self, signature: bytes) -> str | None:
        """`duplicate`, `near duplicate`, or None for a new document; only a new one is remembered."""
        exact, *bands = np.frombuffer(signature, "<u8").tolist()
        if exact in self._seen:
            return "duplicate"
        if any(band in self._seen for band in bands):
            return "near duplicate"
        self._seen.add(exact)
        for band in bands:
            self._seen.add(band)
        return None


class IntSet:
    """A set of 64-bit integers in 8 bytes each: the newest in a Python set, the others in one sorted array."""

    RECENT = 1 << 20

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted = array("Q")

    def __contains__(self, number: int) -> bool:
        if number in self._recent:
            return True
        index = bisect_left(self._sorted, number)
        return index < len(self._sorted) and self._sorted[index] == number

    def add(self, number: int) -> None:
        """Add a number that is not in the set."""
        self._recent.add(number)
        if len(self._recent) >= self.RECENT:
            self._sorted.extend(sorted(self._recent))
            np.frombuffer(self._sorted, np.uint64).sort(kind="stable")  # merges the two runs, in place
            self._recent.clear()
