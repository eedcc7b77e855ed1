"""Packed files as streams: gzip, zstd, xz, bzip2, several members one behind another, whole or cut off."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import BinaryIO


def _zstd():
    import zstandard

    # 2 GB: what zstd --long=31 writes, as large corpora are; the library's own limit is 128 MB
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


PACKINGS: dict[str, tuple[str, Callable]] = {
    ".gz": ("gzip", lambda: zlib.decompressobj(wbits=31)),
    ".zst": ("zstd", _zstd),
    ".xz": ("xz", lzma.LZMADecompressor),
    ".bz2": ("bzip2", bz2.BZ2Decompressor),
}
FED = 4096  # bytes given to a decoder at a time, so that a small file which unpacks to a huge one fills no memory


class Unpacked(io.RawIOBase):
    """The contents of a packed file. If cut off or damaged it ends where it cannot be read on, `broken` says why."""

    def __init__(self, raw: BinaryIO, name: str, make: Callable):
        self.raw, self.name, self.make, self.broken = raw, name, make, None
        self._decoder, self._inside, self._packed, self._ready = make(), False, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready and self.broken is None:
            self._packed = self._packed or self.raw.read(FED)
            if not self._packed:
                if self._inside:
                    self.broken = f"truncated {self.name}, the rest of the file is unread"
                break
            self._unpack()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _unpack(self) -> None:
        if not self._inside and not self._packed.strip(b"\0"):  # padding at the end
            self._packed = b""
            return
        try:
            self._inside, self._ready = True, memoryview(self._decoder.decompress(self._packed))
        except Exception as error:  # each library has its own
            if isinstance(error, MemoryError):
                raise
            self.broken = f"damaged {self.name}, the rest of the file is unread"
            return
        self._packed = b""
        if self._decoder.eof:  # members may follow one another
            self._packed, self._decoder, self._inside = self._decoder.unused_data, self.make(), False


def cut_off(file: BinaryIO) -> str | None:
    """Why a file that has been read to its end had more to give, or None."""
    return getattr(getattr(file, "raw", None), "broken", None)
