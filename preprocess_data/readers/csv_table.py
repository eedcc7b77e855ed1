"""CSV and TSV: rows below a first line with the names of the columns."""

import csv
from collections.abc import Iterator
from typing import Any, BinaryIO

from preprocess_data.readers.decompress import read_error
from preprocess_data.readers.records import (
    MAX_RECORD_BYTES,
    TOO_LONG,
    InvalidRecord,
    RawChunk,
    group_records,
    quote,
    read_lines,
)

_BROKEN = InvalidRecord("broken CSV")
_UNCLOSED = InvalidRecord("broken CSV, a quote is never closed: the rest of the file is unread")


def read_csv(file: BinaryIO, delimiter: str = ",") -> Iterator[RawChunk]:
    yield from group_records(_rows(file, delimiter))


def read_tsv(file: BinaryIO) -> Iterator[RawChunk]:
    yield from read_csv(file, "\t")


def _rows(file: BinaryIO, delimiter: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    rows = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if (invalid := _invalid(error, file)) is not None:
                yield line, invalid
            continue
        if not names:
            names = row
        elif len(row) == len(names):
            yield line, dict(zip(names, row))
        elif row:
            yield line, InvalidRecord("another number of columns", quote(str(row)))


def _lines(file: BinaryIO) -> Iterator[str]:
    """The lines of the file; bytes that are not UTF-8 become surrogates, which are found when the text is cleaned."""
    too_long = [
        b"x" * (MAX_RECORD_BYTES + 1) + b"\n"
    ]  # in place of a line that was skipped: csv raises its limit error
    for _, data in read_lines(file):
        for line in data.splitlines(True) if isinstance(data, bytes) else too_long:
            yield line.decode("utf-8", "surrogateescape")


def _invalid(error: csv.Error, file: BinaryIO) -> InvalidRecord | None:
    """The parser's error about a row; None where the file itself was truncated, which is reported once."""
    if "end of data" in str(error):
        return None if read_error(file) else _UNCLOSED
    return TOO_LONG if "limit" in str(error) else _BROKEN
