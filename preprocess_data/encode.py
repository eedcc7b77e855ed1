"""Documents to tokens on all cores, in the order of the input, holding only a few blocks at a time."""

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from preprocess_data.readers import Broken
from utils.chat_template import encode_chats
from utils.text import clean_text, is_held_out
from utils.tokenizer import load_tokenizer

BLOCK_CHARACTERS = 1 << 20  # one unit of work; the output does not depend on it


@dataclass
class Encoded:
    """Documents of one split out of one block: tokens (N,), the length of each document, characters, mask or None."""

    tokens: np.ndarray
    lengths: np.ndarray
    characters: int
    mask: np.ndarray | None = None


@dataclass
class Block:
    """What became of one block: its documents by split, and the dropped by reason."""

    splits: dict[str, Encoded] = field(default_factory=dict)
    dropped: Counter = field(default_factory=Counter)
    records: int = 0


@dataclass(frozen=True)
class Limits:
    """Documents outside these lengths, in characters, are dropped; 0 is no upper limit."""

    min_characters: int = 1
    max_characters: int = 0

    def reason(self, characters: int) -> str | None:
        if characters < max(1, self.min_characters):
            return "too short" if characters else "empty"
        return "too long" if 0 < self.max_characters < characters else None


class TextEncoder:
    """Encodes a block of texts as `<s> text </s>`."""

    def __init__(self, tokenizer_path: Path, limits: Limits):
        self.tokenizer, self.limits = load_tokenizer(tokenizer_path), limits

    def __call__(self, texts: list[str | Broken]) -> Block:
        block, kept = Block(records=len(texts)), {"train": [], "val": []}
        for text in texts:
            if isinstance(text, Broken):
                block.dropped[text.reason] += 1
                continue
            text = clean_text(text)
            if reason := self.limits.reason(len(text)):
                block.dropped[reason] += 1
            else:
                kept["val" if is_held_out(text) else "train"].append(text)
        for split, documents in kept.items():
            bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
            ids = [(bos, *row, eos) for row in self.tokenizer.encode_batch(documents)]
            block.splits[split] = Encoded(_join(ids), _lengths(ids), sum(map(len, documents)))
        return block


class ChatEncoder:
    """Encodes a block of conversations with the mask of what the assistant wrote.

    A row is (messages, held_out); held_out None lets the hash of its contents decide.
    """

    def __init__(self, tokenizer_path: Path, limits: Limits):
        self.tokenizer, self.limits = load_tokenizer(tokenizer_path), limits

    def __call__(self, rows: list[tuple | Broken]) -> Block:
        block, kept = Block(records=len(rows)), {"train": [], "val": []}
        for row in rows:
            if isinstance(row, Broken):
                block.dropped[row.reason] += 1
                continue
            messages, held_out = row
            text = "\n".join(message["content"] for message in messages)
            if reason := self.limits.reason(len(text)):
                block.dropped[reason] += 1
                continue
            kept["val" if (is_held_out(text) if held_out is None else held_out) else "train"].append(messages)
        for split, conversations in kept.items():
            encoded = encode_chats(self.tokenizer, conversations)
            ids, masks = [ids for ids, _ in encoded], [mask for _, mask in encoded]
            written = sum(len(m["content"].strip()) for row in conversations for m in row if m["role"] == "assistant")
            block.splits[split] = Encoded(_join(ids), _lengths(ids), written, _join(masks))
        return block


def _join(rows: list) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=np.uint32) for row in rows]) if rows else np.zeros(0, np.uint32)


def _lengths(rows: list) -> np.ndarray:
    return np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))


def blocks(items: Iterable, size: Callable[[object], int]) -> Iterator[list]:
    """Consecutive items in lists of about BLOCK_CHARACTERS."""
    block, filled = [], 0
    for item in items:
        block.append(item)
        filled += size(item) + 16
        if filled >= BLOCK_CHARACTERS:
            yield block
            block, filled = [], 0
    if block:
        yield block


def available_cores() -> int:
    """Cores this process may use: a container often sees fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(make_encoder: Callable[[], Callable], work: Iterable, workers: int) -> Iterator[Block]:
    """encoder(item) for every item, in order, on `workers` processes (0: all cores), a few items ahead at most."""
    workers = workers or available_cores()
    if workers == 1:
        encoder = make_encoder()
        yield from map(encoder, work)
        return
    # spawn: a forked copy of a process whose tokenizer has started its threads can hang
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (make_encoder,)) as pool:
        running: deque = deque()
        for item in work:
            running.append(pool.submit(_work, item))
            if len(running) >= 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _start_worker(make_encoder: Callable[[], Callable]) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker is one core
    _encoder = make_encoder()


def _work(item):
    return _encoder(item)
