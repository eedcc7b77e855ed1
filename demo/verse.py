"""The form and the rhyme of a classical Chinese poem, as the demo defines them.

Form: the number of verses (lines) and the characters in each. Rhyme: the last characters of all even
verses belong to one rhyme group of the Zhonghua Tongyun (GF 0022-2019), the rhyme table of modern
Standard Chinese. Tones are ignored, and so is the medial glide (an, ian, uan and üan rhyme).

Poets rhymed by the pronunciation of their time, which modern Chinese has partly lost: by this rule about 69% of real
poems rhyme, and about 4% of poems made of random lines.
"""

import re

from pypinyin import Style, lazy_pinyin

from preprocess_data.corpora.poems import FORMS, poem_form
from utils.text import HAN

# pypinyin writes ü as v. A syllable that is in none of the groups (a bare m, n, ng) rhymes with nothing.
RHYME_GROUPS = (
    "a ia ua", "o uo io", "e ie ve ê", "i", "u", "v", "ai uai", "ei uei", "ao iao", "ou iou",
    "an ian uan van", "en in uen vn", "ang iang uang", "eng ing ueng", "ong iong", "er",
)  # fmt: skip
GROUP_OF = {final: group for group, finals in enumerate(RHYME_GROUPS) for final in finals.split()}

_HAN = re.compile(f"[{HAN}]+")
_VERSE_END = re.compile(r"[\s，。？！；、：,.?!;:]+")


def split_verses(text: str) -> list[str]:
    """Return the verses of a poem: the texts between punctuation marks and line ends."""
    return [verse for verse in _VERSE_END.split(text) if verse]


def form_of(verses: list[str]) -> str | None:
    """Return the name of the form that the verses have, or None; every character must be a Han character."""
    form = poem_form(verses)
    return form if form in FORMS.values() and _HAN.fullmatch("".join(verses)) else None


def rhyme_group(character: str) -> int | None:
    """Return the rhyme group of a character in its most common reading, or None when it has none."""
    return GROUP_OF.get(lazy_pinyin(character, style=Style.FINALS, strict=True)[0])


def rhymes(verses: list[str]) -> bool:
    """Return whether the even verses (the second, the fourth, ...), at least two of them, end in one rhyme group."""
    groups = [rhyme_group(verse[-1]) for verse in verses[1::2]]
    return len(groups) >= 2 and None not in groups and len(set(groups)) == 1
