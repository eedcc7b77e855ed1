"""Chat examples made from the poems and the idioms, in five tasks that a small model learns in minutes.

An example made from a held-out document is held out itself, so the demo never asks what it was trained on.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preprocess_data.corpora import idioms, poems
from utils.errors import UserError
from utils.text import is_held_out

LONGEST_TITLE = 12  # characters; some titles are entire prefaces
LONGEST_EXPLANATION = 80
TRAIN_PER_HELD_OUT = 49  # examples
PARAPHRASED = 0.2  # share of requests that do not use the task's usual wording
SECOND_TURN = 0.1  # share of examples with a second request

# Share of each task. Verse has the largest: the demo measures it, and it takes the longest to learn.
SHARES = {
    **{form: 0.14 for form in poems.FORMS.values()},
    "continue": 0.16,
    "author": 0.1,
    "explain": 0.09,
    "name": 0.09,
}


def poem_request(title: str, form: str) -> str:
    """The request for a poem, with exactly the wording of the evaluation."""
    return f"请以《{title}》为题，写一首{form}。"


def _phrase(random_: random.Random, usual: str, *others: str) -> str:
    return random_.choice(others) if random_.random() < PARAPHRASED else usual


def write_poem(poem: dict[str, Any], random_: random.Random) -> tuple[str, str]:
    title, form = poem["title"], poem["form"]
    others = (
        f"写一首{form}，题目是《{title}》。",
        f"作{form}一首，题为《{title}》。",
        f"我想要一首题为《{title}》的{form}。",
    )
    return _phrase(random_, poem_request(title, form), *others), poem["text"]


def continue_couplet(poem: dict[str, Any], random_: random.Random) -> tuple[str, str]:
    couplet = 2 * random_.randrange(len(poem["lines"]) // 2)
    first, second = poem["lines"][couplet : couplet + 2]
    request = _phrase(random_, f"请接下句：{first}，", f"“{first}”的下一句是什么？", f"{first}，下一句怎么写？")
    return request, f"{second}。"


def tell_author(poem: dict[str, Any], random_: random.Random) -> tuple[str, str]:
    couplet = 2 * random_.randrange(len(poem["lines"]) // 2)
    quoted = "，".join(poem["lines"][couplet : couplet + 2])
    request = _phrase(random_, f"“{quoted}。”是谁写的？", f"“{quoted}。”的作者是谁？", f"谁写了“{quoted}。”？")
    return request, f"这是{poem['dynasty']}代{poem['author']}的《{poem['title']}》。"


def explain_idiom(idiom: dict[str, str], random_: random.Random) -> tuple[str, str]:
    word = idiom["idiom"]
    request = _phrase(random_, f"“{word}”是什么意思？", f"请解释成语“{word}”。", f"成语{word}怎么讲？")
    return request, idiom["explanation"]


def name_idiom(idiom: dict[str, str], random_: random.Random) -> tuple[str, str]:
    meaning = idiom["explanation"]
    request = _phrase(random_, f"哪个成语的意思是：{meaning}", f"{meaning}这说的是哪个成语？", f"猜一个成语：{meaning}")
    return request, idiom["idiom"]


def _fits(task: str) -> Callable[[dict[str, Any]], bool]:
    """Which records a task can use."""
    if task in poems.FORMS.values():
        return lambda poem: poem["form"] == task and len(poem["title"]) <= LONGEST_TITLE and "《" not in poem["title"]
    if task == "continue":
        return lambda poem: poem["form"] != poems.OTHER
    if task == "author":
        return lambda poem: poem["form"] != poems.OTHER and poem["author"] != "佚名" and "《" not in poem["title"]
    if task == "explain":
        return lambda idiom: len(idiom["explanation"]) <= LONGEST_EXPLANATION
    return lambda idiom: len(idiom["explanation"]) <= LONGEST_EXPLANATION and idiom["idiom"] not in idiom["explanation"]


MAKERS: dict[str, Callable[[dict[str, Any], random.Random], tuple[str, str]]] = {
    **{form: write_poem for form in poems.FORMS.values()},
    "continue": continue_couplet,
    "author": tell_author,
    "explain": explain_idiom,
    "name": name_idiom,
}


def make_examples(
    poem_records: list[dict[str, Any]], idiom_records: list[dict[str, Any]], count: int, held_out: bool, seed: int
) -> list[dict[str, Any]]:
    """About `count` chat examples in random order; fewer for a task that has not enough records."""
    random_ = random.Random(seed)
    pairs = []
    for task, share in SHARES.items():
        pool = list(filter(_fits(task), idiom_records if task in ("explain", "name") else poem_records))
        chosen = random_.sample(pool, min(len(pool), round(count * share)))
        pairs += [MAKERS[task](record, random_) for record in chosen]
    random_.shuffle(pairs)
    examples = []
    while pairs:
        turns = [pairs.pop()]
        if pairs and random_.random() < SECOND_TURN:
            turns.append(pairs.pop())
        messages = []
        for request, answer in turns:
            messages += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        examples.append({"messages": messages, "held_out": held_out})
    return examples


def make_chat(corpora_path: Path, count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Chat examples from poems.jsonl and idioms.jsonl: about `count` for training, then count // 49 held out."""
    poem_records = _read(corpora_path / "poems.jsonl")
    idiom_records = _read(corpora_path / "idioms.jsonl")
    examples = []
    for held_out, number in ((False, count), (True, count // TRAIN_PER_HELD_OUT)):
        chosen_poems = [record for record in poem_records if is_held_out(poems.document(record)) == held_out]
        chosen_idioms = [record for record in idiom_records if is_held_out(idioms.document(record)) == held_out]
        examples += make_examples(chosen_poems, chosen_idioms, number, held_out, seed)
    return examples


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} is missing: run python preprocess_data.py fetch {path.stem} first")
    with open(path, "rb") as file:
        return [json.loads(line) for line in file]
