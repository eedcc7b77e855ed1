"""Plain text and Markdown: documents separated by an empty line."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from preprocess_data.readers.encoding import why_not_utf8
from preprocess_data.readers.records import InvalidRecord, ParsedRecords, RawChunk, quote, read_lines


@dataclass(frozen=True)
class Paragraphs:
    """Some documents of a file; the data begins in line `first_line`."""

    first_line: int
    data: bytes

    def records(self) -> Iterator[tuple[int, Any]]:
        start = self.first_line
        document: list[bytes] = []
        for number, line in enumerate([*self.data.split(b"\n"), b""], self.first_line):
            if line.strip():
                document.append(line)
                continue
            if document:
                yield start, _decode(b"\n".join(document))
            start = number + 1
            document = []


def read_text(file: BinaryIO) -> Iterator[RawChunk]:
    for line, data in read_lines(file, (b"\n\n", b"\n\r\n")):
        yield Paragraphs(line, data) if isinstance(data, bytes) else ParsedRecords([(line, data)])


def _decode(data: bytes) -> str | InvalidRecord:
    if b"\0" in data:
        return InvalidRecord("NUL bytes", quote(data))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return InvalidRecord(why_not_utf8(data), quote(data))
