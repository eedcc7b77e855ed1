"""Cleaning of raw text: the same rules for every corpus, so that a text has one canonical form and one hash."""

import hashlib
import re
import unicodedata

# Removed: C0 and C1 controls except newline and tab, BOM, lone surrogates, non-characters.
_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ufeff\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_NOT_CLEAN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NEWLINE = re.compile("\r\n?|[\x85\u2028\u2029]")
_SPACES_AT_END = re.compile(r"[ \t\u3000]+(?=\n|$)")
_MANY_NEWLINES = re.compile(r"\n{3,}")

HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # for a character class
_HAN = re.compile(f"[{HAN}]")

HELD_OUT_ONE_IN = 50


def clean_text(text: str) -> str:
    """The canonical form of a text: NFC, newlines as \\n, no control characters, no surrounding spaces. Idempotent.

    The spaces and tabs of the first line stay where it is indented with them: they are part of code.
    """
    if _is_clean(text):
        return text
    text = _NEWLINE.sub("\n", text)
    text = unicodedata.normalize("NFC", _NOT_TEXT.sub("", text))
    text = _MANY_NEWLINES.sub("\n\n", _SPACES_AT_END.sub("", text)).rstrip()
    start = len(text) - len(text.lstrip())
    return text[len(text[:start].rstrip(" \t")) :]


def _is_clean(text: str) -> bool:
    """Whether a text is unchanged by `clean_text`, as most are; takes a quarter of its time."""
    return not (
        _NOT_CLEAN.search(text)
        or "\n\n\n" in text
        or " \n" in text
        or "\t\n" in text
        or "\u3000\n" in text
        or text.rstrip() != text
        or text.lstrip(" \t") != text.lstrip()
        or not unicodedata.is_normalized("NFC", text)
    )


def has_surrogates(text: str) -> bool:
    """Whether a text contains a lone surrogate, which cannot be encoded in UTF-8."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def is_held_out(text: str) -> bool:
    """Whether a document with this cleaned text belongs to the validation split (one in fifty, by its sha1)."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest(), "big") % HELD_OUT_ONE_IN == 0


def is_han(char: str) -> bool:
    """Whether a character is a Chinese character (ideographs with their extensions, 々 and 〇)."""
    return _HAN.fullmatch(char) is not None
