"""JSON lines: one JSON value per line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from preprocess_data.readers.records import InvalidRecord, ParsedRecords, RawChunk, quote, read_lines


@dataclass(frozen=True)
class JsonLines:
    """Some lines of a file, the first of them with the number `first_line`."""

    first_line: int
    data: bytes

    def records(self) -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                if not line.strip():
                    continue
                record = InvalidRecord(_reason(line), quote(line))
            yield number, record


def read_jsonl(file: BinaryIO) -> Iterator[RawChunk]:
    for line, data in read_lines(file):
        yield JsonLines(line, data) if isinstance(data, bytes) else ParsedRecords([(line, data)])


def _reason(line: bytes) -> str:
    """Why a line is not JSON."""
    if b"\0" in line:
        return "NUL bytes"
    try:
        json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "broken JSON"
    return "lone surrogate" if b"\\u" in line else "broken JSON"  # Python reads it, the standard forbids it
