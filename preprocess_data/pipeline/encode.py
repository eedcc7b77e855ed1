"""Chunks of raw records to tokens: parse, clean, filter, split and encode. Pure; the workers run it."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from preprocess_data.corpora.registry import ToText
from preprocess_data.pipeline.chunks import Chunk, EncodedChunk, EncodedDocuments
from preprocess_data.pipeline.dedup import signature
from preprocess_data.pipeline.fast_encoder import REFERENCE, encode_documents, load_encoder
from preprocess_data.pipeline.filters import Filters
from preprocess_data.pipeline.token_writer import token_dtype
from preprocess_data.readers.chat import to_messages
from preprocess_data.readers.encoding import why_surrogates
from preprocess_data.readers.records import MAX_RECORD_BYTES, TOO_LONG, InvalidRecord, quote
from utils.chat_template import Messages, encode_chats, has_loss, trim
from utils.text import clean_text, has_surrogates, is_held_out

SPLITS = ("train", "val")
EMPTY = InvalidRecord("empty")
NO_LOSS = "no answer with loss"  # filtered


@dataclass(frozen=True)
class EncodeConfig:
    """What is done to every chunk; small, and the same for all workers."""

    chat: bool
    tokenizer_path: Path
    filters: Filters
    where: str = ""
    dedup: str = "none"
    library: str = REFERENCE  # that encodes
    fingerprint: str = ""  # of the tokenizer


class Document(NamedTuple):
    """A valid record: its text, what is encoded (the text or messages), and whether it is marked as held out.

    unread: names of fields that are left out. filtered: why it is not wanted, filters aside.
    """

    text: str
    content: Any
    held_out: bool | None = None
    unread: frozenset[str] = frozenset()
    filtered: str | None = None


class ChunkEncoder:
    """Encodes chunks; a subclass defines what a document is and how documents are encoded."""

    def __init__(self, config: EncodeConfig) -> None:
        self.config = config
        self.tokenizer = load_encoder(config.tokenizer_path, config.library)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.where_field, _, wanted = config.where.partition("=")
        self.where_values = set(wanted.split(","))

    def read(self, record: Any, to_text: ToText | None) -> Document | InvalidRecord:
        """Parse and clean one record."""
        raise NotImplementedError

    def encode(self, contents: list, positions: np.ndarray) -> EncodedDocuments:
        """Encode the contents of documents; positions: (D,) their positions in the chunk."""
        raise NotImplementedError

    def __call__(self, chunk: Chunk, limit: int | None = None) -> EncodedChunk:
        """Encode a chunk, or the first `limit` of its records that pass --where."""
        result = EncodedChunk()
        contents: dict[str, list] = {split: [] for split in SPLITS}
        positions: dict[str, list[int]] = {split: [] for split in SPLITS}
        signatures: dict[str, list[bytes]] = {split: [] for split in SPLITS}
        for line, record in chunk.data.records():
            if self._excluded(record):
                result.filtered[f"not {self.config.where}"] += 1
                continue
            if result.consumed == limit:
                break
            result.consumed += 1
            document = self._read_or_quote(record, chunk.to_text)
            if isinstance(document, InvalidRecord):
                result.invalid.append((line, document))
                continue
            if reason := document.filtered or self.config.filters.reason(document.text):
                result.filtered[reason] += 1
                continue
            result.unread.update(document.unread)
            held_out = is_held_out(document.text) if document.held_out is None else document.held_out
            split = "val" if held_out else "train"
            contents[split].append(document.content)
            positions[split].append(result.consumed)
            if self.config.dedup != "none":
                signatures[split].append(signature(document.text, self.config.dedup))
        for split in SPLITS:
            result.splits[split] = self.encode(contents[split], np.array(positions[split], np.int64))
            result.splits[split].signatures = signatures[split]
        return result

    def _read_or_quote(self, record: Any, to_text: ToText | None) -> Document | InvalidRecord:
        """`read`, with the beginning of the record added to the reason why it is invalid."""
        if isinstance(record, InvalidRecord):
            return record
        document = self.read(record, to_text)
        if isinstance(document, InvalidRecord) and not document.record:
            return InvalidRecord(document.reason, quote(_to_str(record)))
        return document

    def _excluded(self, record: Any) -> bool:
        """Whether --where excludes a record; records without the field, or with null in it, are kept."""
        if not self.where_field or not isinstance(record, dict) or record.get(self.where_field) is None:
            return False
        return _to_str(record[self.where_field]) not in self.where_values


class TextEncoder(ChunkEncoder):
    """Documents as `<s> text </s>`."""

    def read(self, record: Any, to_text: ToText | None) -> Document | InvalidRecord:
        assert to_text is not None
        text = clean_document(to_text(record))
        return text if isinstance(text, InvalidRecord) else Document(text, text)

    def encode(self, contents: list[str], positions: np.ndarray) -> EncodedDocuments:
        ids, lengths = encode_documents(self.tokenizer, contents)
        return EncodedDocuments(ids.astype(self.dtype), lengths, _lengths(contents), positions)


class ChatEncoder(ChunkEncoder):
    """Conversations, with a mask of the tokens with loss. One without a `held_out` mark is split by its hash."""

    def read(self, record: Any, to_text: ToText | None) -> Document | InvalidRecord:
        found = to_messages(record)
        if isinstance(found, InvalidRecord):
            return found
        text = "\n".join(message["content"] for message in found.messages)
        if len(text) > MAX_RECORD_BYTES:
            return TOO_LONG
        filtered = None if any(map(has_loss, found.messages)) else NO_LOSS
        return Document(text, found.messages, found.held_out, found.unread, filtered)

    def encode(self, contents: list[Messages], positions: np.ndarray) -> EncodedDocuments:
        encoded = encode_chats(self.tokenizer, contents)
        ids = [ids for ids, _ in encoded]
        masks = [mask for _, mask in encoded]
        characters = [
            sum(len(trim(message["content"])) for message in messages if has_loss(message)) for messages in contents
        ]
        return EncodedDocuments(
            _concatenate(ids, self.dtype),
            _lengths(ids),
            np.array(characters, np.int64),
            positions,
            _concatenate(masks, np.dtype(np.uint8)),
        )


def clean_document(text: str | InvalidRecord) -> str | InvalidRecord:
    """The cleaned text of a record, or why it is invalid."""
    if isinstance(text, InvalidRecord):
        return text
    if len(text) > MAX_RECORD_BYTES:
        return TOO_LONG
    cleaned = clean_text(text)
    if cleaned is not text and has_surrogates(text):  # some readers decode bytes that are not UTF-8 to surrogates
        return InvalidRecord(why_surrogates(text))
    return cleaned or EMPTY


def encode_chunk(config: EncodeConfig, chunk: Chunk, limit: int | None = None) -> EncodedChunk:
    """Encode a chunk, or the first `limit` of its records that pass --where."""
    return _chunk_encoder(config)(chunk, limit)


@lru_cache(1)
def _chunk_encoder(config: EncodeConfig) -> ChunkEncoder:
    return ChatEncoder(config) if config.chat else TextEncoder(config)


def _to_str(value: Any) -> str:
    """A value as text; empty for one that is nested too deep to be printed."""
    try:
        return str(value)
    except RecursionError:
        return ""


def _concatenate(parts: list, dtype: np.dtype) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts]) if parts else np.zeros(0, dtype)


def _lengths(parts: list) -> np.ndarray:
    return np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
