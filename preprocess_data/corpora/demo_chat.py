"""Chat rows made from the poems and the idioms, in five tasks, so that a small model can be taught to talk in minutes.

A row made from a held-out document is held out itself, so the demo's questions are never ones it was trained on.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

from preprocess_data.corpora import idioms, poems
from utils.errors import UserError
from utils.text import is_held_out

LONGEST_TITLE = 12  # characters; some titles are whole prefaces
LONGEST_EXPLANATION = 80
TRAIN_ROWS_A_HELD_OUT_ROW = 49
ANOTHER_WORDING = 0.2  # share of requests that are not in the task's usual words
SECOND_TURN = 0.1  # share of rows that go on with a second request

# Share of each task. Verse has the most: it is what the demo measures, and what takes the longest to learn.
SHARES = {
    **{form: 0.14 for form in poems.FORMS.values()},
    "continue": 0.16,
    "author": 0.1,
    "explain": 0.09,
    "name": 0.09,
}


def poem_request(title: str, form: str) -> str:
    """The request for a poem, word for word as the evaluation asks it."""
    return f"请以《{title}》为题，写一首{form}。"


def _choose(random_: random.Random, usual: str, *others: str) -> str:
    return random_.choice(others) if random_.random() < ANOTHER_WORDING else usual


def write_poem(poem: dict, random_: random.Random) -> tuple[str, str]:
    title, form = poem["title"], poem["form"]
    others = (
        f"写一首{form}，题目是《{title}》。",
        f"作{form}一首，题为《{title}》。",
        f"我想要一首题为《{title}》的{form}。",
    )
    return _choose(random_, poem_request(title, form), *others), poem["text"]


def continue_couplet(poem: dict, random_: random.Random) -> tuple[str, str]:
    couplet = 2 * random_.randrange(len(poem["lines"]) // 2)
    first, second = poem["lines"][couplet : couplet + 2]
    request = _choose(random_, f"请接下句：{first}，", f"“{first}”的下一句是什么？", f"{first}，下一句怎么写？")
    return request, f"{second}。"


def tell_author(poem: dict, random_: random.Random) -> tuple[str, str]:
    couplet = 2 * random_.randrange(len(poem["lines"]) // 2)
    quoted = "，".join(poem["lines"][couplet : couplet + 2])
    request = _choose(random_, f"“{quoted}。”是谁写的？", f"“{quoted}。”的作者是谁？", f"谁写了“{quoted}。”？")
    return request, f"这是{poem['dynasty']}代{poem['author']}的《{poem['title']}》。"


def explain_idiom(idiom: dict, random_: random.Random) -> tuple[str, str]:
    word = idiom["idiom"]
    request = _choose(random_, f"“{word}”是什么意思？", f"请解释成语“{word}”。", f"成语{word}怎么讲？")
    return request, idiom["explanation"]


def name_idiom(idiom: dict, random_: random.Random) -> tuple[str, str]:
    sense = idiom["explanation"]
    request = _choose(random_, f"哪个成语的意思是：{sense}", f"{sense}这说的是哪个成语？", f"猜一个成语：{sense}")
    return request, idiom["idiom"]


def _fits(task: str) -> Callable[[dict], bool]:
    """Which documents a task can be made from."""
    if task in poems.FORMS.values():
        return lambda poem: poem["form"] == task and len(poem["title"]) <= LONGEST_TITLE and "《" not in poem["title"]
    if task == "continue":
        return lambda poem: poem["form"] != poems.OTHER
    if task == "author":
        return lambda poem: poem["form"] != poems.OTHER and poem["author"] != "佚名" and "《" not in poem["title"]
    if task == "explain":
        return lambda idiom: len(idiom["explanation"]) <= LONGEST_EXPLANATION
    return lambda idiom: len(idiom["explanation"]) <= LONGEST_EXPLANATION and idiom["idiom"] not in idiom["explanation"]


MAKERS = {
    **{form: write_poem for form in poems.FORMS.values()},
    "continue": continue_couplet,
    "author": tell_author,
    "explain": explain_idiom,
    "name": name_idiom,
}


def make_rows(poem_rows: list[dict], idiom_rows: list[dict], rows: int, held_out: bool, seed: int) -> list[dict]:
    """About `rows` chat rows in mixed order; a task whose documents run out has fewer."""
    random_, pairs = random.Random(seed), []
    for task, share in SHARES.items():
        pool = list(filter(_fits(task), idiom_rows if task in ("explain", "name") else poem_rows))
        chosen = random_.sample(pool, min(len(pool), round(rows * share)))
        pairs += [MAKERS[task](document, random_) for document in chosen]
    random_.shuffle(pairs)
    chats = []
    while pairs:
        turns = [pairs.pop()]
        if pairs and random_.random() < SECOND_TURN:
            turns.append(pairs.pop())
        messages = []
        for request, answer in turns:
            messages += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        chats.append({"messages": messages, "held_out": held_out})
    return chats


def make_chat(corpora_path: Path, rows: int, seed: int = 1) -> list[dict]:
    """Chat rows from poems.jsonl and idioms.jsonl: about `rows` for training, and a forty-ninth of it held out."""
    poem_rows, idiom_rows = _read(corpora_path / "poems.jsonl"), _read(corpora_path / "idioms.jsonl")
    split = {
        held_out: (
            [row for row in poem_rows if is_held_out(poems.document(row)) == held_out],
            [row for row in idiom_rows if is_held_out(idioms.document(row)) == held_out],
        )
        for held_out in (False, True)
    }
    return make_rows(*split[False], rows, False, seed) + make_rows(
        *split[True], rows // TRAIN_ROWS_A_HELD_OUT_ROW, True, seed
    )


def _read(path: Path) -> list[dict]:
    if not path.is_file():
        raise UserError(f"{path} is missing: run python preprocess_data.py fetch {path.stem} first")
    with open(path, "rb") as file:
        return [json.loads(line) for line in file]
