"""Files to records, one at a time: a reader is one short function, found by the file's suffix.

A reader takes an open binary file and yields records (a dict, or a str where the format knows no fields). A record
that cannot be read comes out as a `Broken`, so that it is counted and not lost.
"""

import glob
import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ijson
import orjson

from utils.errors import UserError

_BOM = b"\xef\xbb\xbf"
READERS: dict[str, Callable[[BinaryIO], Iterator]] = {}


@dataclass(frozen=True)
class Broken:
    """A record that could not be read, and why."""

    reason: str


def reader(*suffixes: str):
    """Register a reader for these file suffixes."""

    def register(function):
        READERS.update(dict.fromkeys(suffixes, function))
        return function

    return register


@reader(".jsonl", ".ndjson")
def read_jsonl(file: BinaryIO) -> Iterator:
    """One JSON value a line."""
    for number, line in enumerate(file):
        if number == 0:
            line = line.removeprefix(_BOM)
        if line.strip():
            try:
                yield orjson.loads(line)
            except orjson.JSONDecodeError:
                yield Broken("broken JSON")


@reader(".json")
def read_json(file: BinaryIO) -> Iterator:
    """One list of records, read as a stream: the file may be larger than the memory. Some such files hold lines."""
    if file.peek(1024).removeprefix(_BOM).lstrip()[:1] == b"{":
        yield from read_jsonl(file)
        return
    if file.peek(3).startswith(_BOM):
        file.read(3)
    try:
        yield from ijson.items(file, "item", use_float=True)
    except ijson.JSONError:
        yield Broken("broken JSON, the rest of the file is unread")


@reader(".txt", ".md")
def read_text(file: BinaryIO) -> Iterator:
    """Plain text: an empty line ends a document."""
    block: list[bytes] = []
    for line in file:
        if line.strip():
            block.append(line)
        elif block:
            yield _decode(b"".join(block))
            block = []
    if block:
        yield _decode(b"".join(block))


def _decode(data: bytes) -> str | Broken:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return Broken("not UTF-8")


def find_reader(path: Path) -> Callable[[BinaryIO], Iterator]:
    """The reader for a file name, `.gz` aside; UserError when there is none."""
    name = path.name.removesuffix(".gz")
    try:
        return READERS[Path(name).suffix.lower()]
    except KeyError:
        raise UserError(f"no reader for {path}: a file is one of {' '.join(sorted(READERS))}, each also .gz") from None


class Position:
    """How many bytes of the input have been read, for the progress bar."""

    done = 0


def read_file(path: Path, position: Position | None = None) -> Iterator:
    """The records of one file. A gzip file that was cut off ends with a `Broken`."""
    read, before = find_reader(path), position.done if position else 0
    with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
        try:
            for record in read(file):
                if position:
                    position.done = before + raw.tell()
                yield record
        except (EOFError, gzip.BadGzipFile, zlib.error):
            yield Broken("truncated gzip, the rest of the file is unread")


def data_files(folder: Path) -> list[Path]:
    """The readable files below a folder, in a fixed order. Hidden ones are left out: they are downloads under way."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part[0] == "." for part in path.relative_to(folder).parts)
        and Path(path.name.removesuffix(".gz")).suffix.lower() in READERS
    ]


def find_files(source: str) -> list[Path]:
    """The files that a path, a folder or a glob names, in a fixed order; UserError when there is none."""
    path = Path(source)
    if path.is_file():
        return [path]
    found = data_files(path) if path.is_dir() else sorted(map(Path, glob.glob(source, recursive=True)))
    found = [path for path in found if path.is_file()]
    if not found:
        raise UserError(f"no data file {source}: give a file, a folder, a glob or the name of a corpus")
    return found
