"""What passes between the main process and the workers: a chunk of the input, and the same chunk encoded."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from preprocess_data.corpora.registry import ToText
from preprocess_data.readers.records import InvalidRecord, RawChunk


@dataclass(frozen=True)
class Chunk:
    """One chunk of one file. `file` and `index` are its position in the input; `to_text` is None for chat examples."""

    source: str
    file: int
    index: int
    path: str
    data: RawChunk
    to_text: ToText | None


@dataclass
class EncodedDocuments:
    """Documents of one split of one chunk, concatenated. N tokens, D documents."""

    tokens: np.ndarray  # (N,)
    lengths: np.ndarray  # (D,)
    characters: np.ndarray  # (D,)
    positions: np.ndarray  # (D,) in the chunk, over both splits
    mask: np.ndarray | None = None  # (N,), 1 where a token carries loss
    signatures: list[bytes] = field(default_factory=list)

    def select(self, keep: np.ndarray) -> "EncodedDocuments":
        """The documents for which keep, (D,) bool, is true; without their signatures."""
        kept = np.repeat(keep, self.lengths)
        mask = None if self.mask is None else self.mask[kept]
        return EncodedDocuments(
            self.tokens[kept], self.lengths[keep], self.characters[keep], self.positions[keep], mask
        )


@dataclass
class EncodedChunk:
    """A chunk's documents by split, its filtered records by reason, its invalid ones as (line, InvalidRecord).

    unread: the documents by the fields that are left out of them.
    """

    splits: dict[str, EncodedDocuments] = field(default_factory=dict)
    filtered: Counter = field(default_factory=Counter)
    unread: Counter = field(default_factory=Counter)
    invalid: list[tuple[int, InvalidRecord]] = field(default_factory=list)
    consumed: int = 0  # records that pass --where
