"""Which documents are kept: by their length and by the script they are written in."""

import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np

from utils.errors import UserError

LETTERS, HAN, KANA, HANGUL, LATIN, CYRILLIC = range(1, 7)  # 0 is what is no letter, 1 the letters of any other script
# What the scripts of a text say about its language. Latin and Cyrillic name no language: many are written in each.
LANGUAGES = {
    "zh": lambda share: share[HAN] >= 0.5 and share[KANA] < 0.05,
    "ja": lambda share: share[HAN] + share[KANA] >= 0.5 and share[KANA] >= 0.05,
    "ko": lambda share: share[HANGUL] >= 0.5,
    "latin": lambda share: share[LATIN] >= 0.5,
    "cyrillic": lambda share: share[CYRILLIC] >= 0.5,
}
_SCRIPT_OF = {
    "CJK": HAN,
    "IDEOGRAPHIC": HAN,
    "HIRAGANA": KANA,
    "KATAKANA": KANA,
    "KATAKANA-HIRAGANA": KANA,
    "HANGUL": HANGUL,
    "LATIN": LATIN,
    "CYRILLIC": CYRILLIC,
}
_LAST = 0x323AF  # the last Chinese character of Unicode; no letter of the scripts above stands behind it


@dataclass(frozen=True)
class Filters:
    """Says why a cleaned document is dropped, if it is.

    Lengths are in characters, max_characters 0 is no limit. language is `zh`, `ja`, `ko`, `latin`, `cyrillic`, or
    several with commas between, one of which must fit: it goes by the share of a text's letters that stand in the
    language's script, at least a half (LANGUAGES); a text without a letter fits none. UserError for another name.
    """

    min_characters: int = 1
    max_characters: int = 0
    language: str = ""

    def __post_init__(self):
        for name in filter(None, self.language.split(",")):
            if name not in LANGUAGES:
                raise UserError(f"--language={self.language}: {name} is none of {', '.join(LANGUAGES)}")

    def reason(self, text: str) -> str | None:
        """`empty`, `too short`, `too long`, `not zh`, or None for a text that is kept."""
        if len(text) < max(1, self.min_characters):
            return "too short" if text else "empty"
        if 0 < self.max_characters < len(text):
            return "too long"
        if self.language:
            share = script_shares(text)
            if not any(LANGUAGES[name](share) for name in filter(None, self.language.split(","))):
                return f"not {self.language.replace(',', ' or ')}"
        return None


def script_shares(text: str) -> np.ndarray:
    """(7,) the share of a text's letters in each script, by the constants above; all 0 without a letter."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    counts = np.bincount(_scripts()[np.minimum(codes, _LAST)], minlength=1 + CYRILLIC)
    counts[0] = 0
    return counts / max(1, counts.sum())


@cache
def _scripts() -> np.ndarray:
    """(_LAST + 1,) the script of every character, by the first word of its Unicode name."""

    def script(char: str) -> int:
        if not char.isalpha() and char != "〇":  # the zero of Chinese numerals is a number to Unicode
            return 0
        words = unicodedata.name(char, "").replace("HALFWIDTH ", "").replace("FULLWIDTH ", "").split(" ")
        return _SCRIPT_OF.get(words[0], LETTERS)

    return np.fromiter((script(chr(code)) for code in range(_LAST + 1)), np.uint8, _LAST + 1)
