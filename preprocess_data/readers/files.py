"""The dispatcher: which files a source names, and which reader opens each, by its suffix."""

import glob
import io
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from preprocess_data.readers import records
from preprocess_data.readers.csv_table import read_csv, read_tsv
from preprocess_data.readers.decompress import COMPRESSIONS, DecompressedFile, read_error
from preprocess_data.readers.encoding import foreign_format
from preprocess_data.readers.json_file import read_json
from preprocess_data.readers.parquet_table import read_parquet
from preprocess_data.readers.plain_text import read_text
from preprocess_data.readers.records import InvalidRecord, ParsedRecords, RawChunk
from utils.errors import UserError
from utils.log import log

Reader = Callable[[Any], Iterator[RawChunk]]  # of an io.BufferedReader
READERS: dict[str, Reader] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".md": read_text,
}
# Files about a corpus, or written by an earlier run of preprocessing.
IGNORED = ("readme*", "license*", "*_report.md", "*_rejects.jsonl")


class Position:
    """Number of bytes of the input that have been read, for the progress bar."""

    done = 0


def read_file(path: Path, position: Position | None = None) -> Iterator[RawChunk]:
    """The chunks of one file. A truncated file yields what can be read, then an `InvalidRecord` at line 0.

    That is all of a file in another format or encoding than its name says.
    """
    reader = find_reader(path)
    before = position.done if position else 0
    compression = COMPRESSIONS.get(path.suffix.lower())
    with open(path, "rb", buffering=0) as raw:
        stream = raw if compression is None else DecompressedFile(io.BufferedReader(raw), *compression)
        file = io.BufferedReader(stream, max(records.CHUNK_BYTES, records.START_BYTES))
        found = foreign_format(file.peek(records.START_BYTES))
        suffix = _suffix(path)
        if found and suffix != f".{found}":
            expected = "UTF-8" if found.startswith("UTF") else suffix
            yield ParsedRecords([(0, InvalidRecord(f"{found}, not {expected}, the file is unread"))])
            return
        for chunk in reader(file):
            if position:
                position.done = before + raw.tell()
            yield chunk
        if error := read_error(file):
            yield ParsedRecords([(0, InvalidRecord(error))])


def find_reader(path: Path) -> Reader:
    """The reader for a file name, its compression aside; UserError when there is none."""
    try:
        return READERS[_suffix(path)]
    except KeyError:
        raise UserError(
            f"no reader for {path}: a file is one of {' '.join(sorted(READERS))}, each also {' '.join(COMPRESSIONS)}"
        ) from None


def _suffix(path: Path) -> str:
    """The suffix without that of the compression."""
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return path.suffix.lower()


def find_files(source: str) -> list[Path]:
    """The files that a path, a folder or a glob names, in a fixed order; UserError when there is none."""
    path = Path(source)
    if path.is_file():
        return [path]
    unknown: list[Path] = []
    found = data_files(path, unknown) if path.is_dir() else sorted(map(Path, glob.glob(source, recursive=True)))
    found = [path for path in found if path.is_file()]
    if not found:
        raise UserError(f"no data file {source}: give a file, a folder, a glob or the name of a corpus")
    if unknown:
        names = ", ".join(path.name for path in unknown[:3])
        log(f"{source}: skipped {len(unknown)} files of unknown type ({names}{', ...' if unknown[3:] else ''})")
    return found


def data_files(folder: Path, unknown: list[Path] | None = None) -> list[Path]:
    """The readable files below a folder, in a fixed order; those without a reader are appended to `unknown`.

    Hidden files are skipped, for they are unfinished downloads; so are IGNORED ones.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part[0] == "." for part in path.relative_to(folder).parts)
        if is_hidden or not path.is_file() or any(fnmatch(path.name.lower(), pattern) for pattern in IGNORED):
            continue
        if _suffix(path) in READERS:
            found.append(path)
        elif unknown is not None:
            unknown.append(path)
    return found
