"""Parts of files to blocks of tokens: all that is done to a record, and the processes that do it."""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from preprocess_data.pipeline.dedup import Dedup, signature
from preprocess_data.pipeline.fast_encoder import REFERENCE, encode_documents, load_encoder
from preprocess_data.pipeline.filters import Filters
from preprocess_data.pipeline.write_tokens import token_dtype
from preprocess_data.readers.chat import to_messages
from preprocess_data.readers.files import LONGEST, TOO_LONG, InvalidRecord, Part, quote
from utils.chat_template import encode_chats
from utils.errors import UserError
from utils.text import clean_text, has_surrogates, is_held_out

SPLITS = ("train", "val")
EMPTY = InvalidRecord("empty")


@dataclass(frozen=True)
class Item:
    """One part of one file; `file` and `part` are its place in the input, `take` makes the text of a record."""

    source: int
    file: int
    part: int
    path: str
    data: Part
    take: Callable | None


@dataclass
class Encoded:
    """Documents of one split out of one block, one after another; all but tokens and mask have a number a document."""

    tokens: np.ndarray  # (N,)
    lengths: np.ndarray
    characters: np.ndarray
    places: np.ndarray  # in the block, over both splits
    mask: np.ndarray | None = None  # (N,), 1 where a token carries loss
    signatures: list[bytes] = field(default_factory=list)

    def only(self, keep: np.ndarray) -> "Encoded":
        """The documents for which keep is true."""
        kept = np.repeat(keep, self.lengths)
        mask = None if self.mask is None else self.mask[kept]
        return Encoded(self.tokens[kept], self.lengths[keep], self.characters[keep], self.places[keep], mask)


@dataclass
class Block:
    """What became of one part: its documents by split, the dropped by reason, the bad as (line, InvalidRecord)."""

    splits: dict[str, Encoded] = field(default_factory=dict)
    dropped: Counter = field(default_factory=Counter)
    bad: list[tuple[int, InvalidRecord]] = field(default_factory=list)
    taken: int = 0  # records that --where let pass


@dataclass(frozen=True)
class Recipe:
    """What is done to every part; small, and the same for all workers."""

    chat: bool
    tokenizer_path: Path
    filters: Filters
    where: str = ""
    dedup: str = "none"
    library: str = REFERENCE  # what encodes
    fingerprint: str = ""  # of the tokenizer


class Encoder:
    """encoder(item) is its Block; with a limit, of the first `limit` records that --where lets pass."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.tokenizer = recipe, load_encoder(recipe.tokenizer_path, recipe.library)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.key, _, wanted = recipe.where.partition("=")
        self.values = set(wanted.split(","))

    def __call__(self, item: Item, limit: int | None = None) -> Block:
        block, kept = Block(), {split: ([], [], []) for split in SPLITS}
        for line, record in item.data.records():
            if self.key and isinstance(record, dict) and self.key in record:
                if _written(record[self.key]) not in self.values:
                    block.dropped[f"not {self.recipe.where}"] += 1
                    continue
            if block.taken == limit:
                break
            block.taken += 1
            found = record if isinstance(record, InvalidRecord) else self.read(record, item.take)
            if isinstance(found, InvalidRecord):
                quoted = found.record or found is record
                block.bad.append((line, found if quoted else InvalidRecord(found.reason, quote(_written(record)))))
                continue
            text, document, held_out = found
            if reason := self.recipe.filters.reason(text):
                block.dropped[reason] += 1
                continue
            split = "val" if (is_held_out(text) if held_out is None else held_out) else "train"
            documents, places, signatures = kept[split]
            documents.append(document)
            places.append(block.taken)
            if self.recipe.dedup != "none":
                signatures.append(signature(text, self.recipe.dedup))
        for split, (documents, places, signatures) in kept.items():
            block.splits[split] = self.encode(documents, np.array(places, np.int64))
            block.splits[split].signatures = signatures
        return block


def document(text: str | InvalidRecord) -> str | InvalidRecord:
    """The cleaned text of a record, or why it is bad."""
    if type(text) is InvalidRecord:
        return text
    if len(text) > LONGEST:
        return TOO_LONG
    cleaned = clean_text(text)
    if cleaned is not text and has_surrogates(text):  # so come bytes that are not UTF-8 out of some readers
        return InvalidRecord("not UTF-8")
    return cleaned or EMPTY


class TextEncoder(Encoder):
    """Documents as `<s> text </s>`."""

    def read(self, record, take: Callable) -> tuple[str, str, None] | InvalidRecord:
        text = document(take(record))
        return text if type(text) is InvalidRecord else (text, text, None)

    def encode(self, texts: list[str], places: np.ndarray) -> Encoded:
        ids, lengths = encode_documents(self.tokenizer, texts)
        return Encoded(ids.astype(self.dtype), lengths, _lengths(texts), places)


class ChatEncoder(Encoder):
    """Conversations, with the mask of what the assistant wrote. One that is not marked as held out goes by its hash."""

    def read(self, record, take: None) -> tuple[str, list[dict], bool | None] | InvalidRecord:
        found = to_messages(record)
        if isinstance(found, InvalidRecord):
            return found
        messages, held_out = found
        text = "\n".join(message["content"] for message in messages)
        return (text, messages, held_out) if len(text) <= LONGEST else TOO_LONG

    def encode(self, conversations: list[list[dict]], places: np.ndarray) -> Encoded:
        encoded = encode_chats(self.tokenizer, conversations)
        ids, masks = [ids for ids, _ in encoded], [mask for _, mask in encoded]
        written = [sum(len(m["content"].strip()) for m in row if m["role"] == "assistant") for row in conversations]
        return Encoded(
            _join(ids, self.dtype),
            _lengths(ids),
            np.array(written, np.int64),
            places,
            _join(masks, np.uint8),
        )


def drop_duplicates(block: Block, seen: Dedup) -> list[bytes]:
    """Take out of a block what has come before, in the order of the input; returns the signatures of what stays."""
    places = [(p, split, i) for split, part in block.splits.items() for i, p in enumerate(part.places.tolist())]
    keep = {split: np.ones(len(part.lengths), bool) for split, part in block.splits.items()}
    new = []
    for _, split, i in sorted(places):
        found = block.splits[split].signatures[i]
        if reason := seen.reason(found):
            keep[split][i] = False
            block.dropped[reason] += 1
        else:
            new.append(found)
    block.splits = {split: part.only(keep[split]) for split, part in block.splits.items()}
    return new


def _written(value: object) -> str:
    """A value of a record as text; nothing for one that is nested too deep to be written."""
    try:
        return str(value)
    except RecursionError:
        return ""


def _join(rows: list, dtype) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if rows else np.zeros(0, dtype)


def _lengths(rows: list) -> np.ndarray:
    return np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))


def available_cores() -> int:
    """Cores this process may use: a container often sees fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Processes that encode, as many as asked for (0: one a core); 1 is this process itself. As a context it ends them.

    They start at once, beside what this process has to do first.
    """

    def __init__(self, count: int):
        self.count, self._pool = count or available_cores(), None
        if self.count > 1:
            # spawn: a forked copy of a process whose tokenizer has started its threads can hang
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, context, _start_worker)
            for _ in range(self.count):
                self._pool.submit(int)

    def in_order(self, recipe: Recipe, items: Iterable[Item]) -> Iterator[tuple[Item, Block]]:
        """Every item with its Block, in order; only a few items are held at a time."""
        if self._pool is None:
            for item in items:
                yield item, encode(recipe, item)
            return
        running: deque = deque()
        try:
            for item in items:
                running.append((item, self._pool.submit(encode, recipe, item)))
                if len(running) >= 2 * self.count:
                    item, block = running.popleft()
                    yield item, block.result()
            while running:
                item, block = running.popleft()
                yield item, block.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, for want of memory perhaps: run the same command again, it goes on from "
                "here; with fewer --workers it needs less"
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@lru_cache(1)
def _encoder(recipe: Recipe) -> Encoder:
    return (ChatEncoder if recipe.chat else TextEncoder)(recipe)


def encode(recipe: Recipe, item: Item, limit: int | None = None) -> Block:
    """What becomes of an item, or of its first `limit` records that --where lets pass."""
    return _encoder(recipe)(item, limit)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker is one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that writes
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
