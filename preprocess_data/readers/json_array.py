"""JSON arrays, parsed as a stream: the file may be larger than the memory."""

import sys
from collections.abc import Callable, Iterator
from io import BufferedReader
from typing import Any

from preprocess_data.readers.decompress import read_error
from preprocess_data.readers.jsonl import read_jsonl
from preprocess_data.readers.records import BOM, InvalidRecord, ParsedRecords, RawChunk, group_records

MAX_DEPTH = 100  # of arrays and objects within a record
sys.set_int_max_str_digits(0)  # ijson aborts the process where Python refuses to parse a long integer


def read_json(file: BufferedReader) -> Iterator[RawChunk]:
    """The elements of one array, or JSON lines if the file begins with `{`.

    The line of a record is its number in the array.
    """
    import ijson

    if file.peek(1024).removeprefix(BOM).lstrip()[:1] == b"{":
        yield from read_jsonl(file)
        return
    if file.peek(3).startswith(BOM):
        file.read(3)
    count = 0
    error = None

    def records() -> Iterator[tuple[int, Any]]:
        nonlocal count, error
        try:
            for record in _elements(ijson.basic_parse(file), ijson.ObjectBuilder):
                count += 1
                yield count, record
        except (ijson.JSONError, UnicodeDecodeError, ArithmeticError):
            error = None if read_error(file) else InvalidRecord("broken JSON, the rest of the file is unread")

    yield from group_records(records())
    if error:
        yield ParsedRecords([(count + 1, error)])


def _elements(events: Iterator[tuple[str, Any]], new_builder: Callable[[], Any]) -> Iterator[Any]:
    """The elements of an array. `ijson.items` yields them too, but its memory is quadratic in a record's depth."""
    if next(events)[0] != "start_array":
        yield InvalidRecord("no list")
        return
    depth = 0
    max_depth = 0  # of the current element
    builder = new_builder()
    for event, value in events:
        depth += event.startswith("start") - event.startswith("end")
        if depth < 0:  # the array ends; the parser raises for anything after it
            continue
        max_depth = max(max_depth, depth)
        if max_depth <= MAX_DEPTH:
            builder.event(event, value)
        if depth == 0:
            yield builder.value if max_depth <= MAX_DEPTH else InvalidRecord("nested too deep")
            max_depth = 0
            builder = new_builder()
