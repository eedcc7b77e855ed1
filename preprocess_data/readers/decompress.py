"""Compressed files as streams: gzip, zstd, xz and bzip2, one or several concatenated members.

A truncated or damaged file must be noticed and what precedes the damage must be kept, in every format alike. The
libraries' own file classes differ there (checked with Python 3.11 and zstandard 0.25): bz2 and lzma ignore a damaged
second member, lzma takes zero padding for a truncated one, and zstandard's reader ends without an error where a
frame is truncated. So the libraries' incremental decompressors are used, in one loop.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any


def _zstd() -> Any:
    import zstandard

    # 2 GB: the window of zstd --long=31, as large corpora use; the library's own limit is 128 MB
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


# suffix -> (name, function that returns a decompressor with decompress(), eof and unused_data)
COMPRESSIONS: dict[str, tuple[str, Callable[[], Any]]] = {
    ".gz": ("gzip", lambda: zlib.decompressobj(wbits=31)),
    ".zst": ("zstd", _zstd),
    ".xz": ("xz", lzma.LZMADecompressor),
    ".bz2": ("bzip2", bz2.BZ2Decompressor),
}
INPUT_BYTES = 4096  # per call of a decompressor, so that a decompression bomb does not fill the memory


class DecompressedFile(io.RawIOBase):
    """The contents of a compressed file. It ends before the first damage, and `error` then describes it."""

    def __init__(self, raw: IO[bytes], name: str, new_decompressor: Callable[[], Any]) -> None:
        self.raw = raw
        self.name = name
        self.error: str | None = None
        self._new_decompressor = new_decompressor
        self._decompressor = new_decompressor()
        self._inside_member = False
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer: fewer bytes mean that the contents end."""
        filled = 0
        while filled < len(buffer) and (self._output or self._read_more()):
            count = min(len(buffer) - filled, len(self._output))
            buffer[filled : filled + count] = self._output[:count]
            self._output = self._output[count:]
            filled += count
        return filled

    def _read_more(self) -> bool:
        """Decompress until there is output; False at the end and at the first damage."""
        while not self._output and self.error is None:
            self._input = self._input or self.raw.read(INPUT_BYTES)
            if not self._input:
                if self._inside_member:
                    self.error = f"truncated {self.name}, the rest of the file is unread"
                break
            self._decompress()
        return bool(self._output)

    def _decompress(self) -> None:
        if not self._inside_member and not self._input.strip(b"\0"):  # padding at the end
            self._input = b""
            return
        self._inside_member = True
        try:
            self._output = memoryview(self._decompressor.decompress(self._input))
        except MemoryError:
            raise
        except Exception:  # each library has its own class
            self.error = f"damaged {self.name}, the rest of the file is unread"
            return
        self._input = b""
        if self._decompressor.eof:  # another member may follow
            self._input = self._decompressor.unused_data
            self._decompressor = self._new_decompressor()
            self._inside_member = False


def read_error(file: IO[bytes]) -> str | None:
    """Why a file that was read to its end is incomplete, or None."""
    return getattr(getattr(file, "raw", None), "error", None)
