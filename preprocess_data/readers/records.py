"""What all readers share: chunks of a file, invalid records, and cutting a stream at the ends of lines.

A reader takes an open binary file and yields chunks. Cutting is cheap and happens in one process; the workers parse the
chunks. A chunk's `records()` yields (line, record): a dict, a str where the format has no fields, or an `InvalidRecord`
for what cannot be read, so that it is counted and not lost. No file is held in memory completely, and no record is
longer than MAX_RECORD_BYTES.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from preprocess_data.readers.decompress import read_error

CHUNK_BYTES = 1 << 20  # approximate size of a chunk
START_BYTES = 1 << 16  # of a file, by which its format is recognized
CHUNK_RECORDS = 1024  # records per chunk, where the reader itself parses them
MAX_RECORD_BYTES = 8 << 20
QUOTED_CHARACTERS = 200  # of an invalid record, in the list of rejects
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InvalidRecord:
    """A record that cannot be used: the reason, and how it begins."""

    reason: str
    record: str = ""


TOO_LONG = InvalidRecord(f"longer than {MAX_RECORD_BYTES >> 20} MB")


class RawChunk(Protocol):
    """Part of a file that a worker can parse by itself."""

    def records(self) -> Iterator[tuple[int, Any]]:
        """(line or number in the file, record)."""
        ...


@dataclass(frozen=True)
class ParsedRecords:
    """Records that had to be parsed to cut the file."""

    pairs: list[tuple[int, Any]]

    def records(self) -> Iterator[tuple[int, Any]]:
        return iter(self.pairs)


def read_lines(file: BinaryIO, ends: tuple[bytes, ...] = (b"\n",)) -> Iterator[tuple[int, bytes | InvalidRecord]]:
    """(number of the first line, bytes) of about CHUNK_BYTES each, cut only after one of `ends`.

    More than MAX_RECORD_BYTES without an end is skipped, not held: `TOO_LONG` replaces it. The last bytes of a
    truncated file are left out: they are an incomplete record.
    """
    line = 1  # of the first byte of `rest`
    start = 1  # of the record that `rest` belongs to
    rest = b""
    skipping = False  # inside a record that is too long
    while block := file.read(CHUNK_BYTES):
        data = rest + block
        if line == 1:
            data = data.removeprefix(BOM)
        if skipping:
            end = _first_end(data, ends)
            keep = max(0, len(data) - 2) if end is None else end  # an end may be cut in two
            line += data.count(b"\n", 0, keep)
            data = rest = data[keep:]
            if end is None:
                continue
            yield start, TOO_LONG
            skipping = False
        cut = max(data.rfind(end) + len(end) if end in data else 0 for end in ends)
        if cut:
            yield line, data[:cut]
            line += data.count(b"\n", 0, cut)
        rest = data[cut:]
        skipping = len(rest) > MAX_RECORD_BYTES
        start = line
    if skipping:
        yield start, TOO_LONG
    elif rest and not read_error(file):
        yield line, rest


def _first_end(data: bytes, ends: tuple[bytes, ...]) -> int | None:
    """The first position after one of `ends`."""
    found = [position + len(end) for end in ends if (position := data.find(end)) >= 0]
    return min(found, default=None)


def group_records(
    pairs: Iterator[tuple[int, Any]], new_chunk: Callable[[list[tuple[int, Any]]], RawChunk] = ParsedRecords
) -> Iterator[RawChunk]:
    """Chunks of at most CHUNK_RECORDS records and about CHUNK_BYTES characters or bytes."""
    chunk: list[tuple[int, Any]] = []
    size = 0
    for pair in pairs:
        chunk.append(pair)
        if isinstance(pair[1], dict):
            size += sum(len(value) for value in pair[1].values() if isinstance(value, str))
        elif isinstance(pair[1], bytes):
            size += len(pair[1])
        if len(chunk) >= CHUNK_RECORDS or size >= CHUNK_BYTES:
            yield new_chunk(chunk)
            chunk = []
            size = 0
    if chunk:
        yield new_chunk(chunk)


def quote(record: bytes | str) -> str:
    """How a record begins, as text that can be written to a file."""
    if isinstance(record, str):
        record = record[:QUOTED_CHARACTERS].encode("utf-8", "backslashreplace")
    return record[: 4 * QUOTED_CHARACTERS].decode("utf-8", "backslashreplace")[:QUOTED_CHARACTERS]
