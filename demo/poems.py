"""The held-out poems of the demo corpus, and the statistics of a list of poems."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from demo.verse import form_of, rhymes, split_verses
from preprocess_data.corpora.demo_chat import LONGEST_TITLE
from preprocess_data.corpora.poems import FORMS, document
from utils.errors import UserError
from utils.text import is_held_out


@dataclass(frozen=True)
class Counts:
    """Statistics of some poems: in_form and rhyming count poems, copied and verses count verses.

    Verses of fewer than five characters are not counted: a match of two characters is no copy.
    """

    poems: int
    in_form: int
    rhyming: int
    verses: int
    copied: int


def load_poems(path: str | Path) -> tuple[dict[str, list[dict]], list[str], set[str]]:
    """Return the held-out poems by form, the documents of all held-out poems, and the verses of the training poems.

    Lists are in the order of the file. A poem of any other form is missing from the first, and in the other two.
    """
    if not Path(path).exists():
        raise UserError(f"no poems in {path}: run `python preprocess_data.py fetch poems` inside preprocess_data/")
    held_out: dict[str, list[dict]] = {form: [] for form in FORMS.values()}
    documents: list[str] = []
    training_verses: set[str] = set()
    with open(path, encoding="utf-8") as file:
        for line in file:
            poem = json.loads(line)
            text = document(poem)
            if not is_held_out(text):
                training_verses.update(poem["lines"])
                continue
            documents.append(text)
            if poem["form"] in held_out:
                held_out[poem["form"]].append(poem)
    return held_out, documents, training_verses


def choose_titles(held_out: dict[str, list[dict]], count: int, seed: int) -> list[tuple[str, str]]:
    """Return (title, form) pairs, equally many of each form, drawn from the held-out poems without repeating a title.

    Titles that no chat example has are left out: some are prefaces.
    """
    random_ = random.Random(seed)
    chosen: list[tuple[str, str]] = []
    used: set[str] = set()
    for number, (form, poems) in enumerate(held_out.items()):
        wanted = count // len(held_out) + (number < count % len(held_out))
        titles = dict.fromkeys(poem["title"] for poem in poems)  # unique, in the order of the file
        free = [t for t in titles if t not in used and len(t) <= LONGEST_TITLE and "《" not in t]
        if len(free) < wanted:
            raise UserError(f"only {len(free)} held-out titles of the form {form}, {wanted} asked: lower --poems")
        drawn = random_.sample(free, wanted)
        used.update(drawn)
        chosen += [(title, form) for title in drawn]
    return chosen


def count(texts: list[str], forms: list[str], training_verses: set[str]) -> Counts:
    """Count the poems that have the requested form, those of them that rhyme, and the copied verses.

    A poem of another form is not counted as rhyming: which of its verses are even is not known.
    """
    poems = [split_verses(text) for text in texts]
    in_form = [verses for verses, form in zip(poems, forms, strict=True) if form_of(verses) == form]
    verses = [verse for poem in poems for verse in poem if len(verse) >= 5]
    return Counts(
        poems=len(poems),
        in_form=len(in_form),
        rhyming=sum(map(rhymes, in_form)),
        verses=len(verses),
        copied=sum(verse in training_verses for verse in verses),
    )


def real_poems(held_out: dict[str, list[dict]], each: int, seed: int) -> tuple[list[str], list[str]]:
    """Return texts and forms of real held-out poems, at most `each` of a form and equally many of every form."""
    random_ = random.Random(seed)
    each = min(each, *map(len, held_out.values()))
    drawn = [(poem["text"], form) for form, poems in held_out.items() for poem in random_.sample(poems, each)]
    return [text for text, _ in drawn], [form for _, form in drawn]


def shuffled_poems(texts: list[str], seed: int) -> list[str]:
    """Return poems of the same shapes with the verses of all, of each length, in random order."""
    random_ = random.Random(seed)
    poems = [split_verses(text) for text in texts]
    pools: dict[int, list[str]] = {}
    for verse in (verse for poem in poems for verse in poem):
        pools.setdefault(len(verse), []).append(verse)
    for pool in pools.values():
        random_.shuffle(pool)
    return ["\n".join(pools[len(verse)].pop() for verse in poem) for poem in poems]
