"""Files to parts, parts to records: a reader is one short function, found by the file's suffix.

A reader takes an open binary file and cuts it into parts, each with the number of its first line. Cutting is cheap
and stays in one process; the parts are read by the workers. A part's `records()` yields (line, record): a dict, or a
str where the format knows no fields, or a `InvalidRecord` for what cannot be read, so that it is counted and not lost.
Nothing holds a file whole, and no record is longer than LONGEST bytes.
"""

import csv
import glob
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

import orjson

from preprocess_data.readers.decompress import PACKINGS, Unpacked, cut_off
from utils.errors import UserError
from utils.log import log

BLOCK = 1 << 20  # bytes of a part, about
LONGEST = 8 << 20  # bytes of a record
ROWS = 1024  # records of a part, where they have been read already
QUOTED = 200  # characters that a list of rejects shows of a record
sys.set_int_max_str_digits(0)  # ijson takes the process down where Python refuses to read a long number
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InvalidRecord:
    """A record that cannot be used, why, and how it begins."""

    reason: str
    record: str = ""


_BROKEN_CSV = {
    False: InvalidRecord("broken CSV"),
    True: InvalidRecord("broken CSV, a quote is never closed: the rest of the file is unread"),
}
DEEPEST = 100  # lists and objects in each other, in a record of a JSON list
TOO_LONG = InvalidRecord(f"longer than {LONGEST >> 20} MB")


@dataclass(frozen=True)
class Records:
    """Records that had to be read where the file was cut."""

    rows: list[tuple[int, object]]

    def records(self) -> Iterator[tuple[int, object]]:
        return iter(self.rows)


@dataclass(frozen=True)
class JsonLines:
    """One JSON value a line."""

    first: int
    data: bytes

    def records(self) -> Iterator[tuple[int, object]]:
        for number, line in enumerate(self.data.split(b"\n"), self.first):
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                if not line.strip():
                    continue
                record = InvalidRecord(_what_is_wrong(line), quote(line))
            yield number, record


@dataclass(frozen=True)
class Paragraphs:
    """Plain text: an empty line ends a document."""

    first: int
    data: bytes

    def records(self) -> Iterator[tuple[int, object]]:
        start, document = self.first, []
        for number, line in enumerate([*self.data.split(b"\n"), b""], self.first):
            if line.strip():
                document.append(line)
                continue
            if document:
                yield start, decode(b"\n".join(document))
            start, document = number + 1, []


@dataclass(frozen=True)
class Table:
    """Rows of an Arrow table."""

    first: int
    batch: object

    def records(self) -> Iterator[tuple[int, object]]:
        try:
            return enumerate(self.batch.to_pylist(), self.first)
        except (ValueError, OverflowError):
            return enumerate(map(self._row, range(self.batch.num_rows)), self.first)

    def _row(self, index: int):
        row = {}
        for name, column in zip(self.batch.schema.names, self.batch.columns):
            try:
                row[name] = column[index].as_py()
            except UnicodeDecodeError:
                return InvalidRecord("not UTF-8")
            except (ValueError, OverflowError):  # a date that Python cannot hold: no text, so nothing is lost
                row[name] = None
        return row


Part = Records | JsonLines | Paragraphs | Table
READERS: dict[str, Callable[[BinaryIO], Iterator[Part]]] = {}


def reader(*suffixes: str):
    """Register a reader for these file suffixes."""

    def register(function):
        READERS.update(dict.fromkeys(suffixes, function))
        return function

    return register


@reader(".jsonl", ".ndjson")
def read_jsonl(file: BinaryIO) -> Iterator[Part]:
    for first, data in whole_lines(file):
        yield JsonLines(first, data) if isinstance(data, bytes) else Records([(first, data)])


@reader(".txt", ".md")
def read_text(file: BinaryIO) -> Iterator[Part]:
    for first, data in whole_lines(file, (b"\n\n", b"\n\r\n")):
        yield Paragraphs(first, data) if isinstance(data, bytes) else Records([(first, data)])


@reader(".json")
def read_json(file: BinaryIO) -> Iterator[Part]:
    """One list of records, read as a stream: the file may be larger than the memory. Some such files hold lines.

    The place of a record is its number in the list.
    """
    import ijson

    if file.peek(1024).removeprefix(_BOM).lstrip()[:1] == b"{":
        yield from read_jsonl(file)
        return
    if file.peek(3).startswith(_BOM):
        file.read(3)
    number, last = 0, None

    def records():
        nonlocal number, last
        try:
            for record in _items(ijson.basic_parse(file), ijson.ObjectBuilder):
                number += 1
                yield number, record
        except (ijson.JSONError, UnicodeDecodeError, ArithmeticError):
            last = None if cut_off(file) else InvalidRecord("broken JSON, the rest of the file is unread")

    yield from _in_parts(records())
    if last:
        yield Records([(number + 1, last)])


def _items(events: Iterator[tuple[str, object]], builder_of: Callable) -> Iterator[object]:
    """What stands in a list. `ijson.items` gives it too, with memory that grows by the square of a record's depth."""
    if next(events)[0] != "start_array":
        yield InvalidRecord("no list")
        return
    depth, deepest, builder = 0, 0, builder_of()
    for event, value in events:
        depth += event.startswith("start") - event.startswith("end")
        if depth < 0:  # the list ends; what follows is an error of the parser's
            continue
        deepest = max(deepest, depth)
        if deepest <= DEEPEST:
            builder.event(event, value)
        if depth == 0:
            yield builder.value if deepest <= DEEPEST else InvalidRecord("nested too deep")
            deepest, builder = 0, builder_of()


@reader(".csv")
def read_csv(file: BinaryIO, delimiter: str = ",") -> Iterator[Part]:
    """Rows under a first line with the names of the columns."""
    csv.field_size_limit(LONGEST)
    too_long = [b"x" * (LONGEST + 1) + b"\n"]  # stands for a line that was not held, so that the library says so
    lines = (
        line.decode("utf-8", "surrogateescape")  # bytes that are not UTF-8 are found when the text is looked at
        for _, data in whole_lines(file)
        for line in (data.splitlines(True) if isinstance(data, bytes) else too_long)
    )
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []

    def records():
        nonlocal names
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                unclosed = "end of data" in str(error)
                if not unclosed or not cut_off(file):
                    yield line, TOO_LONG if "limit" in str(error) else _BROKEN_CSV[unclosed]
                continue
            if not names:
                names = row
            elif row:
                fits = len(row) == len(names)
                yield (
                    line,
                    dict(zip(names, row)) if fits else InvalidRecord("another number of columns", quote(str(row))),
                )

    yield from _in_parts(records())


@reader(".tsv")
def read_tsv(file: BinaryIO) -> Iterator[Part]:
    return read_csv(file, "\t")


@reader(".parquet")
def read_parquet(file: BinaryIO) -> Iterator[Part]:
    """Rows of a table; the place of a record is the number of its row. A packed file is unpacked to a temporary one."""
    import shutil
    import tempfile

    import pyarrow
    from pyarrow import parquet

    first = 1
    with tempfile.TemporaryFile() as plain:
        if isinstance(file.raw, Unpacked):
            shutil.copyfileobj(file, plain)
            file = plain
        try:
            for batch in parquet.ParquetFile(file).iter_batches(ROWS):
                yield Table(first, batch)
                first += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            if not isinstance(error, pyarrow.ArrowException) and error.filename is not None:
                raise
            yield Records([(first, InvalidRecord("broken parquet, the rest of the file is unread"))])


def whole_lines(file: BinaryIO, ends: tuple[bytes, ...] = (b"\n",)) -> Iterator[tuple[int, bytes | InvalidRecord]]:
    """(number of the first line, bytes) of about BLOCK, cut only behind one of `ends`.

    What is longer than LONGEST without an end is never held: a `InvalidRecord` stands for it. The end of a file that was cut
    off is left out: it is half an item.
    """
    line, start, rest, lost = 1, 1, b"", False  # rest begins in `line`; what is lost, or too long so far, in `start`
    while chunk := file.read(BLOCK):
        data = rest + chunk
        if line == 1:
            data = data.removeprefix(_BOM)
        if lost:
            found = [at + len(end) for end in ends if (at := data.find(end)) >= 0]
            keep = min(found) if found else max(0, len(data) - 2)  # an end may be cut in two
            line += data.count(b"\n", 0, keep)
            data = rest = data[keep:]
            if not found:
                continue
            yield start, TOO_LONG
            lost = False
        cut = max(data.rfind(end) + len(end) if end in data else 0 for end in ends)
        if cut:
            yield line, data[:cut]
            line += data.count(b"\n", 0, cut)
        rest, lost, start = data[cut:], len(data) - cut > LONGEST, line
    if lost:
        yield start, TOO_LONG
    elif rest and not cut_off(file):
        yield line, rest


def _in_parts(rows: Iterator[tuple[int, object]]) -> Iterator[Records]:
    part, size = [], 0
    for row in rows:
        part.append(row)
        size += sum(len(value) for value in row[1].values() if isinstance(value, str)) if type(row[1]) is dict else 0
        if len(part) >= ROWS or size >= BLOCK:
            yield Records(part)
            part, size = [], 0
    if part:
        yield Records(part)


def decode(data: bytes) -> str | InvalidRecord:
    """Bytes of plain text as a str."""
    if b"\0" in data:
        return InvalidRecord("NUL bytes", quote(data))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return InvalidRecord("not UTF-8", quote(data))


def _what_is_wrong(line: bytes) -> str:
    if b"\0" in line:
        return "NUL bytes"
    try:
        json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "broken JSON"
    return "lone surrogate" if b"\\u" in line else "broken JSON"  # what Python reads and the standard forbids


def quote(record: bytes | str) -> str:
    """How a record begins, as text that can be written."""
    data = record[: 4 * QUOTED] if isinstance(record, bytes) else record[:QUOTED].encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")[:QUOTED]


def _plain_name(path: Path) -> str:
    return path.name.removesuffix(path.suffix) if path.suffix.lower() in PACKINGS else path.name


def find_reader(path: Path) -> Callable[[BinaryIO], Iterator[Part]]:
    """The reader for a file name, the packing aside; UserError when there is none."""
    try:
        return READERS[Path(_plain_name(path)).suffix.lower()]
    except KeyError:
        raise UserError(
            f"no reader for {path}: a file is one of {' '.join(sorted(READERS))}, each also {' '.join(PACKINGS)}"
        ) from None


class Position:
    """How many bytes of the input have been read, for the progress bar."""

    done = 0


def read_file(path: Path, position: Position | None = None) -> Iterator[Part]:
    """The parts of one file. One that was cut off gives what can be read, then a `InvalidRecord`."""
    read, before = find_reader(path), position.done if position else 0
    packing = PACKINGS.get(path.suffix.lower())
    with open(path, "rb", buffering=0 if packing is None else -1) as raw:
        file = io.BufferedReader(raw if packing is None else Unpacked(raw, *packing), BLOCK)
        for part in read(file):
            if position:
                position.done = before + raw.tell()
            yield part
        if broken := cut_off(file):
            yield Records([(0, InvalidRecord(broken))])


NO_DATA = ("readme*", "license*", "*_report.md", "*_rejects.jsonl")  # about a corpus, or written by a run before


def data_files(folder: Path, skipped: list[Path] | None = None) -> list[Path]:
    """The readable files below a folder, in a fixed order; to `skipped` those whose names no reader knows.

    Hidden ones are left out: they are downloads under way. So is what is about the data (NO_DATA).
    """
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part[0] == "." for part in path.relative_to(folder).parts)
        if hidden or not path.is_file() or any(fnmatch(path.name.lower(), pattern) for pattern in NO_DATA):
            continue
        if Path(_plain_name(path)).suffix.lower() in READERS:
            found.append(path)
        elif skipped is not None:
            skipped.append(path)
    return found


def find_files(source: str) -> list[Path]:
    """The files that a path, a folder or a glob names, in a fixed order; UserError when there is none."""
    path, skipped = Path(source), []
    if path.is_file():
        return [path]
    found = data_files(path, skipped) if path.is_dir() else sorted(map(Path, glob.glob(source, recursive=True)))
    found = [path for path in found if path.is_file()]
    if not found:
        raise UserError(f"no data file {source}: give a file, a folder, a glob or the name of a corpus")
    if skipped:
        names = ", ".join(path.name for path in skipped[:3])
        log(f"{source}: {len(skipped)} files of no known kind are left out ({names}{', ...' if skipped[3:] else ''})")
    return found
