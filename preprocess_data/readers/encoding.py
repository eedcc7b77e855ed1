"""What bytes are where they are not what the file's name says, so that an error names the cause."""

import re

# The beginnings of files that are sometimes stored under the name of another format.
_BEGINNINGS = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16"),
    (rb"version https://git-lfs", "a git-lfs pointer"),
    (rb"PAR1", "parquet"),
    (rb"\x1f\x8b", "gzip"),
    (rb"\x28\xb5\x2f\xfd", "zstd"),
    (rb"\xfd7zXZ\0", "xz"),
    (rb"BZh[1-9]1AY&SY", "bzip2"),
    (rb"PK\x03\x04", "zip"),
)
_HIGH = bytes(range(0x80, 0x100))
_GB2312 = re.compile(rb"[\xa1-\xf7][\xa1-\xfe]")  # a common Chinese character or its punctuation, in two bytes


def foreign_format(start: bytes) -> str | None:
    """The format or encoding of a file that begins with these bytes; None for UTF-8 and what cannot be recognized."""
    for beginning, name in _BEGINNINGS:
        if re.match(beginning, start):
            return name
    even, odd = (start[offset:1024:2] for offset in (0, 1))
    zeros, others = sorted((even.count(0), odd.count(0)), reverse=True)
    return "UTF-16" if len(start) > 8 and zeros > len(odd) / 4 and not others else None  # without a byte order mark


def why_not_utf8(data: bytes) -> str:
    """The reason for bytes that are not UTF-8: the most frequent other encoding of Chinese is named."""
    high = len(data) - len(data.translate(None, _HIGH))
    if 2 * len(_GB2312.findall(data)) >= 0.8 * high:
        try:
            data.decode("gb18030")
            return "not UTF-8, perhaps GB18030"
        except UnicodeDecodeError:
            pass
    return "not UTF-8"


def why_surrogates(text: str) -> str:
    """The reason for a text with lone surrogates: in tables they replace bytes that are not UTF-8."""
    try:
        return why_not_utf8(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return "lone surrogate"
