"""The fast encoder: the library gigatoken, used only where its ids equal those of `tokenizers`."""

import json
import random
import re
import unicodedata
from collections.abc import Iterable
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from utils.text import clean_text
from utils.tokenizer import BYTE_OF, Tokenizer, load_tokenizer

REFERENCE = "tokenizers"
FAST = "gigatoken"
CHECKED_CHARACTERS = 50_000  # of the first documents
CACHED_CHARACTERS = 1 << 25  # then the library is created again: its cache of pieces has no limit
# Two control characters, which no cleaned text contains, are the names of <s> and </s> for the library, and the other
# special tokens have none. So many documents are encoded as one string, and no text is encoded as a special token.
_BOS = "\x01"
_EOS = "\x02"
_HAN = range(0x4E00, 0x9FA6)
# In UTF-8 these characters have three bytes, of which the first is E4 to E9. A token with such a byte after its first
# byte, or with more than two bytes after it, spans a Chinese character and its neighbor.
_SPANS_HAN = re.compile(rb".[\xe4-\xe9]|[\xe4-\xe9]...", re.DOTALL)


class FastTokenizer(Tokenizer):
    """A tokenizer that encodes with gigatoken; its texts must be cleaned (`utils.text.clean_text`).

    If no token spans a Chinese character and its neighbor, as with --split_han, the ids of a Chinese character do not
    depend on its context and are read from a table. The library encodes the rest of the text, with one Chinese
    character as a placeholder for each run of them. That is several times as fast.
    """

    def __init__(self, reference: Tokenizer) -> None:
        vars(self).update(vars(reference))
        if self.bos_id == self.eos_id:
            raise ValueError("one token begins and ends its documents")
        if self.text_tokens:
            raise ValueError("it has added tokens that are text")
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        settings = json.loads(self.backend.to_str())
        names = {self.bos_id: _BOS, self.eos_id: _EOS}
        settings["added_tokens"] = [{"id": i, "content": name, **plain} for i, name in names.items()]
        settings["truncation"] = settings["padding"] = settings["post_processor"] = None
        self._settings = json.dumps(settings)
        self._fast = self._new_library()
        self._encoded_characters = 0
        tokens = (bytes(map(BYTE_OF.get, token, repeat(0))) for token in reference.backend.get_vocab(False))
        self._placeholder: int | None = None
        if not any(map(_SPANS_HAN.search, tokens)):
            self._make_table()

    def _new_library(self) -> Any:
        import gigatoken

        return gigatoken.Tokenizer.from_json(self._settings)

    def _make_table(self) -> None:
        """The ids of every Chinese character, and the placeholder for a run: the first character with a single id."""
        ids = self._fast.encode(_BOS + _BOS.join(map(chr, _HAN)))
        starts = np.flatnonzero(ids == self.bos_id)
        counts = np.diff(starts, append=len(ids)) - 1
        if len(starts) == len(_HAN) and set(counts.tolist()) <= {1, 2, 3} and 1 in counts:
            self._counts = counts.astype(np.uint8)
            self._ids = ids[np.minimum(starts[:, None] + [1, 2, 3], len(ids) - 1)]  # (characters, 3), _counts of them
            self._placeholder = int(counts.argmin())

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(N,) the ids of all texts as <s> text </s>, concatenated, and (D,) the length of each."""
        if not texts:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        text = f"{_BOS}{f'{_EOS}{_BOS}'.join(texts)}{_EOS}"
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        self._encoded_characters += len(text)
        if self._encoded_characters > CACHED_CHARACTERS:
            self._fast = self._new_library()
            self._encoded_characters = len(text)
        if self._placeholder is None:
            ids = self._fast.encode(text)
        else:
            ids, codes = self._encode_by_table(codes)
        starts = np.flatnonzero(ids == self.bos_id)
        if len(starts) != len(texts):
            raise ValueError("a text that is not cleaned")
        if len(ambiguous := _ambiguous_positions(codes)):
            documents = np.split(ids, starts[1:])
            for i in np.unique(np.searchsorted(np.flatnonzero(codes == ord(_BOS)), ambiguous) - 1).tolist():
                documents[i] = np.array([self.bos_id, *super().encode(texts[i]), self.eos_id], ids.dtype)
            return np.concatenate(documents), np.fromiter(map(len, documents), np.int64, len(documents))
        return ids, np.diff(starts, append=len(ids))

    def _encode_by_table(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text of (N,) code points, and its code points without those that the table encodes."""
        assert self._placeholder is not None
        is_han = codes - np.uint32(_HAN.start) < len(_HAN)  # smaller code points wrap around
        kept = ~is_han
        kept[1:] |= kept[:-1].copy()  # the first of each run is kept, as the placeholder
        rest = codes[kept]
        rest[is_han[kept]] = _HAN.start + self._placeholder
        ids = self._fast.encode(rest.tobytes().decode("utf-32-le"))

        han = codes[is_han] - np.uint32(_HAN.start)
        counts = self._counts[han]
        han_ids = np.repeat(self._ids[han, 0], counts)
        several = np.flatnonzero(counts > 1)
        starts = np.cumsum(counts, dtype=np.int64)[several] - counts[several]
        for offset in (1, 2):
            has_more = counts[several] > offset
            han_ids[starts[has_more] + offset] = self._ids[han[several[has_more]], offset]

        lengths = np.ones(len(ids), np.int64)
        is_placeholder = ids == self._ids[self._placeholder, 0]
        if len(han):
            lengths[is_placeholder] = np.add.reduceat(counts, np.flatnonzero(kept[is_han]), dtype=np.int64)
        ids = np.repeat(ids, lengths)
        ids[np.repeat(is_placeholder, lengths)] = han_ids
        return ids, rest

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids, lengths = self.encode_documents(texts)
        ends = np.cumsum(lengths).tolist()
        ids = ids.tolist()
        return [ids[end - length + 1 : end - 1] for end, length in zip(ends, lengths.tolist())]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]


# Per code point, filled on demand: 1 ordinary, 2 of a category that no pre-tokenizer pattern matches, 3 unassigned.
_kinds = np.zeros(0x110000, np.uint8)


def _ambiguous_positions(codes: np.ndarray) -> np.ndarray:
    """Positions in a text, (N,) code points, where the two libraries are known to pre-tokenize differently.

    Text that no pattern matches is one piece for `tokenizers`, and one piece per character for gigatoken: two adjacent
    format or private-use characters. Whether a character is assigned depends on the Unicode version.
    """
    kinds = _kinds[codes]
    if not kinds.all():
        for code in np.unique(codes[kinds == 0]).tolist():
            kind = unicodedata.category(chr(code))
            _kinds[code] = 3 if kind == "Cn" else 2 if kind in ("Cf", "Co") else 1
        kinds = _kinds[codes]
    return np.flatnonzero((kinds == 3) | (kinds == 2) & (np.append(kinds[1:], 0) == 2))


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the ids of all texts as <s> text </s>, concatenated, and (D,) the length of each."""
    if isinstance(tokenizer, FastTokenizer):
        return tokenizer.encode_documents(texts)
    documents = [(tokenizer.bos_id, *ids, tokenizer.eos_id) for ids in tokenizer.encode_batch(texts)]
    if not documents:
        return np.zeros(0, np.uint32), np.zeros(0, np.int64)
    ids = np.concatenate([np.asarray(document, np.uint32) for document in documents])
    return ids, np.fromiter(map(len, documents), np.int64, len(documents))


def load_encoder(path: Path, name: str) -> Tokenizer:
    """The tokenizer of a folder, which encodes with the library of this name."""
    reference = load_tokenizer(path)
    return FastTokenizer(reference) if name == FAST else reference


def choose_encoder(reference: Tokenizer, wanted: str, documents: Iterable[str]) -> tuple[str, str]:
    """The library to encode with, and why: the fast one if its ids equal the reference's on all compared texts.

    documents: texts of the run, of which the first are compared.
    """
    if wanted == REFERENCE:
        return REFERENCE, "asked for"
    try:
        fast = FastTokenizer(reference)
    except ImportError:
        return REFERENCE, f"{FAST} is not installed"
    except BaseException as error:  # a panic of the library is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        return REFERENCE, f"{FAST} does not take this tokenizer ({str(error).splitlines()[0][:80]})"
    for what, texts in (
        ("of the hard texts", hard_texts(reference)),
        ("of the documents", first_documents(documents)),
    ):
        if (text := first_difference(reference, fast, texts)) is not None:
            return REFERENCE, f"{FAST} gives other ids for one {what}, {text[:20]!r}"
    return FAST, f"the same ids as {REFERENCE} on the first documents and on a set of hard texts"


def first_documents(documents: Iterable[str]) -> list[str]:
    """The first CHECKED_CHARACTERS of the documents, cleaned."""
    texts = []
    remaining = CHECKED_CHARACTERS
    for text in documents:
        texts.append(clean_text(text[:remaining]))
        remaining -= len(text)
        if remaining <= 0:
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
    """Texts on which encoders are likely to differ: all pairs of unusual pieces, tokens of the vocabulary, and long
    random concatenations of both, with the names of special and added tokens. Deterministic for a tokenizer."""
    random_ = random.Random(1)
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    step = max(1, tokenizer.vocab_size // 2000)
    tokens = [tokenizer.decode([i], skip_special=False) for i in range(0, tokenizer.vocab_size, step)]
    pieces = [*_PIECES, *added]
    texts = [first + second for first in pieces for second in pieces] + tokens + _LONG
    for pool in (pieces, tokens, [*pieces, *tokens, *_LONG]):
        texts += ["".join(random_.choices(pool, k=random_.randrange(3, 60))) for _ in range(300)]
    return [text for text in map(clean_text, texts) if text]


def name_and_version(library: str) -> str:
    """For the meta file."""
    return f"{library} {version(library)}"
