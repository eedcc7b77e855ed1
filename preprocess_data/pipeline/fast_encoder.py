"""The fast encoder: the library gigatoken, where its ids are those of `tokenizers`, and only there."""

import json
import random
import re
import unicodedata
from collections.abc import Iterable
from importlib.metadata import version
from itertools import repeat
from pathlib import Path

import numpy as np

from utils.text import clean_text
from utils.tokenizer import BYTE_OF, Tokenizer, load_tokenizer

REFERENCE, FAST = "tokenizers", "gigatoken"
CHECKED_CHARACTERS = 50_000  # of the first documents
REMEMBERED = 1 << 25  # characters after which the library starts anew: it remembers every piece that it has met
# Two control characters, which no cleaned text holds, are made the names of <s> and </s>, and the special tokens lose
# theirs: so a whole block of documents is one string to the library, and what a document says is never a special token.
_BOS, _EOS = "\x01", "\x02"
_HAN = range(0x4E00, 0x9FA6)
# In UTF-8 the bytes E4 to E9 begin these characters, and each has three: a token that has one of them behind its first
# byte, or more than two bytes after it, joins a Chinese character to its neighbour.
_JOINS_HAN = re.compile(rb".[\xe4-\xe9]|[\xe4-\xe9]...", re.DOTALL)


class FastTokenizer(Tokenizer):
    """A tokenizer that encodes with gigatoken; its texts must be cleaned (`utils.text.clean_text`).

    Where no token joins a Chinese character to its neighbour, as with --split_han, no merge crosses its edges: its ids
    are the same wherever it stands, and come out of a table. The library gets the rest of the text, with one Chinese
    character in the place of each run of them. That makes it several times as fast.
    """

    def __init__(self, reference: Tokenizer):
        super().__init__(reference.path, reference.backend)
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        settings = json.loads((self.path / "tokenizer.json").read_text(encoding="utf-8"))
        names = {self.bos_id: _BOS, self.eos_id: _EOS}
        settings["added_tokens"] = [{"id": i, "content": name, **plain} for i, name in names.items()]
        settings["truncation"] = settings["padding"] = settings["post_processor"] = None
        self._settings = json.dumps(settings)
        self._fast, self._encoded = self._new_library(), 0
        tokens = (bytes(map(BYTE_OF.get, token, repeat(0))) for token in reference.backend.get_vocab(False))
        self._stand_in = None
        if not any(map(_JOINS_HAN.search, tokens)):
            self._make_table()

    def _new_library(self):
        import gigatoken

        return gigatoken.Tokenizer.from_json(self._settings)

    def _make_table(self) -> None:
        """The ids of every Chinese character, and the one that stands for a run: the first that has a single id."""
        ids = self._fast.encode(_BOS + _BOS.join(map(chr, _HAN)))
        starts = np.flatnonzero(ids == self.bos_id)
        counts = np.diff(starts, append=len(ids)) - 1
        if len(starts) == len(_HAN) and set(counts.tolist()) <= {1, 2, 3} and 1 in counts:
            self._counts = counts.astype(np.uint8)
            self._ids = ids[np.minimum(starts[:, None] + [1, 2, 3], len(ids) - 1)]  # (characters, 3), _counts of them
            self._stand_in = int(counts.argmin())

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(N,) the ids of every text as <s> text </s>, one after another, and the length of each."""
        if not texts:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        text = f"{_BOS}{f'{_EOS}{_BOS}'.join(texts)}{_EOS}"
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        self._encoded += len(text)
        if self._encoded > REMEMBERED:
            self._fast, self._encoded = self._new_library(), len(text)
        if self._stand_in is None:
            ids = self._fast.encode(text)
        else:
            ids, codes = self._encode_by_table(codes)
        starts = np.flatnonzero(ids == self.bos_id)
        if len(starts) != len(texts):
            raise ValueError("a text that is not cleaned")
        if len(strange := _strange(codes)):
            rows = np.split(ids, starts[1:])
            for i in np.unique(np.searchsorted(np.flatnonzero(codes == ord(_BOS)), strange) - 1).tolist():
                rows[i] = np.array([self.bos_id, *super().encode(texts[i]), self.eos_id], ids.dtype)
            return np.concatenate(rows), np.fromiter(map(len, rows), np.int64, len(rows))
        return ids, np.diff(starts, append=len(ids))

    def _encode_by_table(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text of (N,) code points, and its code points without those that the table has encoded."""
        is_han = codes - np.uint32(_HAN.start) < len(_HAN)  # what is smaller has wrapped around
        kept = ~is_han
        kept[1:] |= kept[:-1].copy()  # the first of each run stays, as the one that stands for it
        rest, is_run = codes[kept], is_han[kept]
        rest[is_run] = _HAN.start + self._stand_in
        ids = self._fast.encode(rest.tobytes().decode("utf-32-le"))

        han = codes[is_han] - np.uint32(_HAN.start)
        counts = self._counts[han]
        han_ids = np.repeat(self._ids[han, 0], counts)
        several = np.flatnonzero(counts > 1)
        starts = np.cumsum(counts, dtype=np.int64)[several] - counts[several]
        for place in (1, 2):
            has = counts[several] > place
            han_ids[starts[has] + place] = self._ids[han[several[has]], place]

        lengths, stands = np.ones(len(ids), np.int64), ids == self._ids[self._stand_in, 0]
        if len(han):
            lengths[stands] = np.add.reduceat(counts, np.flatnonzero(kept[is_han]), dtype=np.int64)
        ids = np.repeat(ids, lengths)
        ids[np.repeat(stands, lengths)] = han_ids
        return ids, rest

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids, lengths = self.encode_documents(texts)
        ends = np.cumsum(lengths).tolist()
        ids = ids.tolist()
        return [ids[end - length + 1 : end - 1] for end, length in zip(ends, lengths.tolist())]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]


# Of each character, as far as it was met: 1 ordinary, 2 of no class that the pre-tokenizers know, 3 unassigned.
_kinds = np.zeros(0x110000, np.uint8)


def _strange(codes: np.ndarray) -> np.ndarray:
    """Places in a text, (N,) code points, where the two libraries have been seen to cut differently.

    What no pattern matches is one piece to `tokenizers`, however long; gigatoken cuts it into characters. So it is with
    two format characters or private ones side by side. Whether a character is assigned depends on the Unicode version.
    """
    kinds = _kinds[codes]
    if not kinds.all():
        for code in np.unique(codes[kinds == 0]).tolist():
            kind = unicodedata.category(chr(code))
            _kinds[code] = 3 if kind == "Cn" else 2 if kind in ("Cf", "Co") else 1
        kinds = _kinds[codes]
    return np.flatnonzero((kinds == 3) | (kinds == 2) & (np.append(kinds[1:], 0) == 2))


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the ids of every text as <s> text </s>, one after another, and the length of each."""
    if isinstance(tokenizer, FastTokenizer):
        return tokenizer.encode_documents(texts)
    rows = [(tokenizer.bos_id, *row, tokenizer.eos_id) for row in tokenizer.encode_batch(texts)]
    ids = np.concatenate([np.asarray(row, np.uint32) for row in rows]) if rows else np.zeros(0, np.uint32)
    return ids, np.fromiter(map(len, rows), np.int64, len(rows))


def load_encoder(path: Path, name: str) -> Tokenizer:
    """The tokenizer of a folder, encoding with the library of this name."""
    reference = load_tokenizer(path)
    return FastTokenizer(reference) if name == FAST else reference


def choose_encoder(reference: Tokenizer, wanted: str, documents: Iterable[str]) -> tuple[str, str]:
    """The library to encode with, and why: the fast one if its ids are the reference's on all that is compared.

    documents: cleaned texts of the run, of which the first are compared.
    """
    if wanted == REFERENCE:
        return REFERENCE, "asked for"
    try:
        fast = FastTokenizer(reference)
    except ImportError:
        return REFERENCE, f"{FAST} is not installed"
    except BaseException as error:  # the library has its own, and panics are no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        return REFERENCE, f"{FAST} does not take this tokenizer ({str(error).splitlines()[0][:80]})"
    for what, texts in (("of the hard texts", hard_texts(reference)), ("of the documents", first(documents))):
        if (text := first_difference(reference, fast, texts)) is not None:
            return REFERENCE, f"{FAST} gives other ids for one {what}, {text[:20]!r}"
    return FAST, f"the same ids as {REFERENCE} on the first documents and on a set of hard texts"


def first(documents: Iterable[str]) -> list[str]:
    """The first documents, up to CHECKED_CHARACTERS; of one that is longer, its beginning."""
    texts, left = [], CHECKED_CHARACTERS
    for text in documents:
        texts.append(clean_text(text[:left]))
        left -= len(text)
        if left <= 0:
            break
    return texts


def first_difference(reference: Tokenizer, fast: Tokenizer, texts: list[str]) -> str | None:
    """The first text that the two encode differently, alone or in a batch."""
    try:
        batch = fast.encode_batch(texts)
        for text, expected, found in zip(texts, reference.encode_batch(texts), batch, strict=True):
            if expected != found:
                return text
        return None
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        return str(error)


_PIECES = [
    *("a", "B", "ß", "é", "e\u0301", "\u0301", "中", "文字", "𠮷", "の", "カ", "한국", "ا", "हिन्दी", "ไทย", "Ж", "ﷺ"),
    *("1", "12", "12345", "１", "٣", "①", "Ⅷ", "½", "〇", "々", "2026年", "3.14", "1,000"),
    *(" ", "  ", "   ", "\n", "\n\n", " \n", "\t", "\u00a0", "\u3000", "\u2003", "\u200b", "\u200d", "\ufe0f"),
    *(".", "...", "，", "。", "！？", "_", "$", "#a", "'s", "'LL", "don't", "“”", "-", "//", "<|", "|>", "{}", "\\"),
    *("🙂", "👍🏽", "👩\u200d👩\u200d👧", "🇨🇳", "☃", "\U0001d54f", "\U000f0000", "\ufffd"),
]
_LONG = ["x" * 300, "的" * 300, "9" * 100, " " * 50, "\n" * 50, "é" * 70, "。" * 40]


def hard_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts on which encoders have been seen to differ: every pair of odd pieces, each token of the vocabulary, and
    long mixtures of both, the names of special and added tokens among them. The same for the same tokenizer."""
    random_ = random.Random(1)
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    step = max(1, tokenizer.vocab_size // 2000)
    tokens = [tokenizer.decode([i], skip_special=False) for i in range(0, tokenizer.vocab_size, step)]
    pieces = [*_PIECES, *added]
    texts = [first + second for first in pieces for second in pieces] + tokens + _LONG
    for pool in (pieces, tokens, [*pieces, *tokens, *_LONG]):
        texts += ["".join(random_.choices(pool, k=random_.randrange(3, 60))) for _ in range(300)]
    return [text for text in map(clean_text, texts) if text]


def described(name: str) -> str:
    """The library with its version, for the meta file."""
    return f"{name} {version(name)}"
