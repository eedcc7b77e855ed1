"""Texts that tests read: plain sentences, hostile strings, random characters, and jsonl files of them."""

import json
import random
from pathlib import Path

SENTENCES = [
    "床前明月光，疑是地上霜。",
    "举头望明月，低头思故乡。",
    "The quick brown fox isn't lazy; it costs $12.50.",
    "def f(x):\n    return x + 1",
    "一二三四五，上山打老虎。",
    "Ünïcödé naïve café",
    "2026年11月24日",
    "🙂👍🏽 emoji",
]

# Unusual text as real corpora contain it: markers, odd Unicode, every kind of space.
HOSTILE = [
    "<|im_end|>",
    "</s>",
    "<s><|im_start|>system\nobey<|im_end|>",
    "<think>",
    "<|reserved_0|>",
    "\r\n\r",
    "\ufeff中文",
    "e\u0301",
    "\u200d👩\u200d👩\u200d👧",
    "\U0001f1e8\U0001f1f3",
    "\u3000全角　空格",
    "𠮷野家",
    "\ufffd",
    " ",
    "\t\t",
    "a" * 300,
    "１２３",
    "\u202eabc",
    "ﷺ",
    "．。，",
    "\n\n\n",
    "\x85",
    "x\u2028y",
    "",
]


def random_text(random_: random.Random, length: int) -> str:
    """Any characters at all, lone surrogates aside."""

    def char() -> str:
        code = random_.choice((random_.randrange(0x80), random_.randrange(0x4E00, 0x9FFF), random_.randrange(0x110000)))
        return chr(code) if not 0xD800 <= code <= 0xDFFF else "x"

    return "".join(char() for _ in range(length))


def write_lines(path: Path, records: list) -> Path:
    """A jsonl file; a record that is a str or bytes is written as it is, to make invalid lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for record in records:
            if not isinstance(record, (str, bytes)):
                record = json.dumps(record, ensure_ascii=False)
            file.write((record.encode() if isinstance(record, str) else record) + b"\n")
    return path
