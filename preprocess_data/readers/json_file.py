"""JSON files: one value per line, or values over several lines and the elements of lists, parsed as a stream."""

import io
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, BinaryIO

from preprocess_data.readers import records
from preprocess_data.readers.decompress import read_error
from preprocess_data.readers.json_record import parse_record
from preprocess_data.readers.records import (
    BOM,
    START_BYTES,
    TOO_LONG,
    InvalidRecord,
    ParsedRecords,
    RawChunk,
    group_records,
    read_lines,
)

BROKEN = InvalidRecord("broken JSON, the rest of the file is unread")
LISTS = "data|train|rows|examples|records|items|instances|samples"  # fields that hold all records of a file

_GAP = re.compile(rb"[\s,:]*")
_WORD = re.compile(rb"[^\s,:\[\]{}\"]*")  # a number, true, false, null
_STRUCTURE = re.compile(rb'["\[\]{}]')
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)  # up to its end, or to half an escape
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_FLAT = rb'(?:[^"{}\[\]]++|' + _STRING + rb")*+"  # what is in a list or an object without others in it
_VALUE = _STRING + rb"|\{" + _FLAT + rb"\}|\[" + _FLAT + rb'\]|[^\s"{}\[\],]++'
_MEMBERS = rb"(?:" + _STRING + rb"\s*+:\s*+(?:" + _VALUE + rb")\s*+,\s*+)*"
_CONVERSATION = re.compile(rb"\[\s*\{\s*" + _MEMBERS + rb'"(?:role|from)"\s*:', re.DOTALL)
_WITH_LIST = re.compile(
    rb"\{\s*" + _MEMBERS + rb'"(?:' + LISTS.encode() + rb')"\s*:\s*(?=\[\s*[\[{])(?!' + _CONVERSATION.pattern + rb")",
    re.DOTALL,
)
_CLOSING = {b"[": b"]", b"{": b"}"}


@dataclass(frozen=True)
class JsonLines:
    """Some lines of a file, the first of them with the number `first_line`."""

    first_line: int
    data: bytes

    def records(self) -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            record = parse_record(line)
            if not isinstance(record, InvalidRecord) or line.strip():
                yield number, record


@dataclass(frozen=True)
class JsonValues:
    """Some values of a file with their numbers."""

    pairs: list[tuple[int, bytes | InvalidRecord]]

    def records(self) -> Iterator[tuple[int, Any]]:
        for number, value in self.pairs:
            yield number, parse_record(value) if isinstance(value, bytes) else value


def read_json(file: BufferedReader) -> Iterator[RawChunk]:
    """JSON lines; values that are written over several lines; the elements of a list, or of `{"data": [...]}`.

    The line of a record is that of its beginning; of an element, its number in the list. A list of turns is one record.
    """
    if file.peek(3).startswith(BOM):
        file.read(3)
    if is_lines(file.peek(START_BYTES).lstrip()):
        for line, data in read_lines(file):
            yield JsonLines(line, data) if isinstance(data, bytes) else ParsedRecords([(line, data)])
    else:
        yield from group_records(split_values(file), JsonValues)


def is_lines(start: bytes) -> bool:
    """Whether a file has one value per line, by its beginning, of which less than all is shown if it is long.

    A first line that is broken JSON does not make its file another format.
    """
    if _WITH_LIST.match(start):
        return False
    is_list = start.startswith(b"[") and not _CONVERSATION.match(start)
    value: bytes | InvalidRecord = TOO_LONG
    if start.startswith((b"[", b"{")):
        with suppress(EOFError):
            value = Scanner(io.BytesIO(start)).value()
    if isinstance(value, InvalidRecord):
        return not is_list
    if b"\n" in value:
        return not is_list and isinstance(parse_record(value), InvalidRecord)
    return not is_list or bool(start[len(value) :].strip())


def split_values(file: BinaryIO) -> Iterator[tuple[int, bytes | InvalidRecord]]:
    """(line or number, bytes) of the values of a file, lists and `{"data": [...]}` replaced by their elements.

    Only brackets and strings are looked at; the values are not parsed. `BROKEN` comes last where they do not match.
    """
    scanner = Scanner(file)
    count = 0

    def elements() -> Iterator[tuple[int, bytes | InvalidRecord]]:
        nonlocal count
        scanner.skip(1)
        while scanner.next() != b"]":
            value = scanner.value(inside=True)
            count += 1
            yield count, value
        scanner.skip(1)

    try:
        while start := scanner.next(inside=False):
            if start == b"[" and not scanner.matches(_CONVERSATION):
                yield from elements()
            elif start == b"{" and (members := scanner.matches(_WITH_LIST)):
                scanner.skip(members)
                yield from elements()
                while scanner.next() != b"}":
                    yield from _other_member(scanner)
                scanner.skip(1)
            else:
                line = scanner.line
                yield line, scanner.value()
    except EOFError:
        if not read_error(file):
            yield count + 1, BROKEN


def _other_member(scanner: "Scanner") -> Iterator[tuple[int, InvalidRecord]]:
    """Skip a member after the list of records; another list is one invalid record, for it may hold records, too."""
    name = scanner.value(inside=True)
    is_list = scanner.next() == b"["
    line = scanner.line
    value = scanner.value(inside=True)
    if is_list and value is TOO_LONG or isinstance(value, bytes) and re.match(rb"\[\s*[\[{]", value):
        yield line, InvalidRecord("another list after that of the records is unread", records.quote(_raw(name)))


def _raw(value: bytes | InvalidRecord) -> bytes:
    return value if isinstance(value, bytes) else b""


class Scanner:
    """Finds the ends of JSON values in a stream, and holds no more of it than one value and one block.

    EOFError where the stream ends inside a value or a list, or where brackets do not match.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.line = 1  # of the next byte
        self._data = b""
        self._at = 0

    def next(self, inside: bool = True) -> bytes:
        """The first byte of the next value or the bracket that closes a list; b"" at the end of the file."""
        while True:
            end = _GAP.match(self._data, self._at).end()  # type: ignore[union-attr]
            self.skip(end - self._at)
            if end < len(self._data):
                return self._data[end : end + 1]
            if not self._fill():
                if inside:
                    raise EOFError
                return b""

    def matches(self, pattern: re.Pattern[bytes]) -> int:
        """How many of the next bytes match a pattern, which can look at START_BYTES of them."""
        while len(self._data) - self._at < START_BYTES and self._fill():
            pass
        match = pattern.match(self._data, self._at)
        return match.end() - self._at if match else 0

    def skip(self, count: int) -> None:
        """Go `count` bytes on."""
        self.line += self._data.count(b"\n", self._at, self._at + count)
        self._at += count

    def value(self, inside: bool = False) -> bytes | InvalidRecord:
        """The bytes of the value that begins here, or TOO_LONG. inside: of a list, in which a word must end."""
        self.next()
        opening = self._data[self._at : self._at + 1]
        if opening not in (b"[", b"{", b'"'):
            return self._word(inside)
        depth = 0
        in_string = False
        too_long = False
        at = self._at
        while True:
            if in_string:
                at = _IN_STRING.match(self._data, at).end()  # type: ignore[union-attr]
                char = self._data[at : at + 1]
                in_string = char != b'"'
                at += not in_string
            else:
                found = _STRUCTURE.search(self._data, at)
                char = found[0] if found else b""
                at = found.end() if found else len(self._data)
                depth += (char in (b"[", b"{")) - (char in (b"]", b"}"))
                in_string = char == b'"'
            if not in_string and char and depth == 0:
                break
            if in_string and char != b'"' or not char:  # the value goes on in the next block
                too_long = too_long or at - self._at > records.MAX_RECORD_BYTES
                if too_long:
                    self.skip(at - self._at)
                at -= self._at
                if not self._fill():
                    raise EOFError
        if char != _CLOSING.get(opening, b'"'):
            raise EOFError
        value = self._data[self._at : at]
        self.skip(at - self._at)
        return TOO_LONG if too_long or len(value) > records.MAX_RECORD_BYTES else value

    def _word(self, inside: bool) -> bytes:
        at_end = False
        while (end := _WORD.match(self._data, self._at).end()) == len(self._data) and not at_end:  # type: ignore[union-attr]
            at_end = end - self._at > records.MAX_RECORD_BYTES or not self._fill()
        if end == self._at or at_end and inside:
            raise EOFError
        word = self._data[self._at : end]
        self.skip(end - self._at)
        return word

    def _fill(self) -> bool:
        """Read another block; the position becomes 0."""
        block = self.file.read(records.CHUNK_BYTES)
        self._data = self._data[self._at :] + block
        self._at = 0
        return bool(block)
