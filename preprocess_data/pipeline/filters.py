"""Document filters: by length and by the script that a text is written in."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from utils.errors import UserError

LETTERS, HAN, KANA, HANGUL, LATIN, CYRILLIC = range(1, 7)  # 0: not a letter, 1: a letter of any other script
# Languages by the scripts of a text. Latin and Cyrillic are scripts of many languages, so they identify none.
LANGUAGES: dict[str, Callable[[np.ndarray], bool]] = {
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
_LAST = 0x323AF  # the last Chinese character of Unicode; no letter of the scripts above has a higher code point


@dataclass(frozen=True)
class Filters:
    """Decides whether a cleaned document is kept.

    Lengths are in characters; max_characters 0 is no limit. language: `zh`, `ja`, `ko`, `latin`, `cyrillic`, or several
    separated by commas, of which one must match: at least half of the letters are in the language's script
    (LANGUAGES). A text without letters matches none. UserError for another name.
    """

    min_characters: int = 1
    max_characters: int = 0
    language: str = ""

    def __post_init__(self) -> None:
        for name in filter(None, self.language.split(",")):
            if name not in LANGUAGES:
                raise UserError(f"--language={self.language}: {name} is none of {', '.join(LANGUAGES)}")

    def reason(self, text: str) -> str | None:
        """Why a text is filtered: `empty`, `too short`, `too long`, `not zh`; None for a text that is kept."""
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
    """(7,) the share of a text's letters per script, indexed by the constants above; all 0 without letters."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    counts = np.bincount(_scripts()[np.minimum(codes, _LAST)], minlength=1 + CYRILLIC)
    counts[0] = 0
    return counts / max(1, counts.sum())


@cache
def _scripts() -> np.ndarray:
    """(_LAST + 1,) the script of every character, by the first word of its Unicode name."""

    def script(char: str) -> int:
        if not char.isalpha() and char != "〇":  # the zero of Chinese numerals is a number in Unicode
            return 0
        words = unicodedata.name(char, "").replace("HALFWIDTH ", "").replace("FULLWIDTH ", "").split(" ")
        return _SCRIPT_OF.get(words[0], LETTERS)

    return np.fromiter((script(chr(code)) for code in range(_LAST + 1)), np.uint8, _LAST + 1)
