"""Parquet: the rows of a table."""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, BinaryIO

from preprocess_data.readers.decompress import DecompressedFile
from preprocess_data.readers.records import CHUNK_RECORDS, InvalidRecord, ParsedRecords, RawChunk


@dataclass(frozen=True)
class ArrowRows:
    """Rows of a pyarrow.RecordBatch, the first of them with the number `first_row`."""

    first_row: int
    batch: Any

    def records(self) -> Iterator[tuple[int, Any]]:
        try:
            return enumerate(self.batch.to_pylist(), self.first_row)
        except (ValueError, OverflowError):
            return enumerate(map(self._row, range(self.batch.num_rows)), self.first_row)

    def _row(self, index: int) -> dict[str, Any] | InvalidRecord:
        row = {}
        for name, column in zip(self.batch.schema.names, self.batch.columns):
            try:
                row[name] = column[index].as_py()
            except UnicodeDecodeError:
                return InvalidRecord("not UTF-8")
            except (ValueError, OverflowError):  # a date out of Python's range: not text, so nothing is lost
                row[name] = None
        return row


def read_parquet(file: BufferedReader) -> Iterator[RawChunk]:
    """The line of a record is the number of its row. A compressed file is decompressed to a temporary file."""
    import shutil
    import tempfile

    import pyarrow
    from pyarrow import parquet

    row = 1
    with tempfile.TemporaryFile() as temporary:
        seekable: BinaryIO = file
        if isinstance(file.raw, DecompressedFile):
            shutil.copyfileobj(file, temporary)
            seekable = temporary
        try:
            for batch in parquet.ParquetFile(seekable).iter_batches(CHUNK_RECORDS):
                yield ArrowRows(row, batch)
                row += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            if not isinstance(error, pyarrow.ArrowException) and error.filename is not None:
                raise
            yield ParsedRecords([(row, InvalidRecord("broken parquet, the rest of the file is unread"))])
