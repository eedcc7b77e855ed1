"""Every format with every compression, intact, damaged and truncated."""

import bz2
import csv
import gzip
import io
import json
import lzma

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from preprocess_data.readers import files, records
from preprocess_data.readers.decompress import COMPRESSIONS
from preprocess_data.readers.files import read_file
from preprocess_data.readers.jsonl import JsonLines
from preprocess_data.readers.records import MAX_RECORD_BYTES, TOO_LONG, InvalidRecord, read_lines

TEXTS = ["第一篇。", 'second, "quoted"', "两行，\n一篇", "é🙂"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def table(delimiter: str) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["id", "text"], *enumerate(TEXTS)])
    return out.getvalue().encode()


def arrow() -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS}), out, row_group_size=2)
    return out.getvalue()


LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
FILES = {
    ".jsonl": LINES,
    ".ndjson": LINES.replace(b"\n", b"\r\n"),
    ".json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    ".csv": table(","),
    ".tsv": table("\t"),
    ".parquet": arrow(),
    ".txt": "\n\n".join(TEXTS).encode(),
    ".md": "\r\n \r\n".join(TEXTS).replace("，\n", "，\r\n").encode() + b"\r\n",
}


def read(path) -> list[tuple[int, object]]:
    """(line, record) of a file."""
    return [pair for chunk in read_file(path) for pair in chunk.records()]


def texts(path) -> list:
    found = [row["text"] if isinstance(row, dict) else row for _, row in read(path)]
    return [text.replace("\r", "") if isinstance(text, str) else text for text in found]


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", FILES)
def test_every_format_with_every_compression_gives_the_same_records(tmp_path, monkeypatch, kind, compression, block):
    monkeypatch.setattr(records, "CHUNK_BYTES", block)
    path = tmp_path / f"a{kind}{compression}"
    path.write_bytes(COMPRESS[compression](FILES[kind]))
    assert texts(path) == TEXTS
    if kind not in (".parquet", ".csv", ".tsv"):
        path.write_bytes(COMPRESS[compression](b"\xef\xbb\xbf" + FILES[kind]))
        assert texts(path) == TEXTS


@pytest.mark.parametrize("kind", [".jsonl", ".txt", ".csv"])
def test_records_know_their_lines(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(records, "CHUNK_BYTES", 10)
    path = tmp_path / f"a{kind}"
    path.write_bytes(FILES[kind])
    starts = {".jsonl": [1, 2, 3, 4], ".txt": [1, 3, 5, 8], ".csv": [2, 3, 4, 6]}  # the third text has two lines
    assert [line for line, _ in read(path)] == starts[kind]


@pytest.mark.parametrize("compression", [suffix for suffix in COMPRESS if suffix])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_the_readable_part_of_a_truncated_file_is_kept_and_the_rest_is_one_reject(tmp_path, kind, compression):
    many = [f"第{i}篇 {i * 2654435761 % 2**32:x}" for i in range(20_000)]
    content = {
        ".jsonl": "".join(json.dumps({"text": text}) + "\n" for text in many),
        ".json": json.dumps([{"text": text} for text in many]),
        ".csv": "text\n" + "".join(f'"{text}"\n' for text in many),
        ".txt": "\n\n".join(many),
    }[kind]
    compressed = COMPRESS[compression](content.encode())
    path = tmp_path / f"a{kind}{compression}"
    cut = compressed[: len(compressed) * 2 // 3]
    path.write_bytes(cut)
    *kept, last = texts(path)
    assert last.reason == f"truncated {COMPRESSIONS[compression][0]}, the rest of the file is unread"
    assert kept == many[: len(kept)] and (len(kept) > 1000 or compression == ".bz2")  # with blocks of 900 kB
    path.write_bytes(cut + b"\xff" * 5000)  # some decompressors notice a little late
    *kept, last = texts(path)
    assert last.reason.endswith("the rest of the file is unread") and kept[:5000] == many[: len(kept)][:5000]
    path.write_bytes(b"not compressed at all")
    assert [type(text) for text in texts(path)] == [InvalidRecord]


def test_concatenated_members_and_padding(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES[:30]) + gzip.compress(LINES[30:]) + b"\0" * 10_000)
    assert texts(path) == TEXTS


@pytest.mark.parametrize("compression", [suffix for suffix in COMPRESS if suffix])
def test_a_damaged_second_member_is_one_reject(tmp_path, compression):
    member = COMPRESS[compression](LINES)
    damaged = member[:1] + bytes([member[1] ^ 255]) + member[2:]
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(member + damaged)
    *kept, last = texts(path)
    assert kept == TEXTS and last.reason == f"damaged {COMPRESSIONS[compression][0]}, the rest of the file is unread"


@pytest.mark.parametrize(
    "line,reason",
    [
        (b'{"text": "a', "broken JSON"),
        (b'{"text": NaN}', "broken JSON"),
        (b"[" * 5000, "broken JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "a\0b"}', "NUL bytes"),
        (b"\0" * 100, "NUL bytes"),
        (rb'{"text": "\ud83d"}', "lone surrogate"),
    ],
)
def test_invalid_lines_have_a_reason(line, reason):
    good = b'{"text": "x"}'
    found = list(JsonLines(5, b"\n".join([good, line, b" \r", good])).records())
    assert [number for number, _ in found] == [5, 6, 8]
    assert found[1][1].reason == reason and found[0][1] == found[2][1] == {"text": "x"}
    json.dumps(found[1][1].record).encode()


@pytest.mark.parametrize("ends", [(b"\n",), (b"\n\n", b"\n\r\n")])
@pytest.mark.parametrize("block", [1 << 8, 1 << 12])
def test_a_line_that_is_too_long_is_one_reject_and_is_never_held_in_memory(monkeypatch, ends, block):
    monkeypatch.setattr(records, "CHUNK_BYTES", block)
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", limit := 20 * block)
    end = ends[0]
    for before in (0, 1, block - 1, block, block + 1):
        data = b"a" * before + end + b"x" * (limit + 3 * block) + end + b"b" + end + b"y" * (limit + 2 * block)
        found = list(read_lines(io.BytesIO(data), ends))
        good = b"".join(part for _, part in found if isinstance(part, bytes))
        assert good.replace(b"\n", b"") == b"a" * before + b"b"
        assert [line for line, part in found if part is TOO_LONG] == [1 + len(end), 1 + 3 * len(end)]


def test_odd_tables(tmp_path):
    path = tmp_path / "a.csv"
    long = b"x" * (MAX_RECORD_BYTES + 10)
    path.write_bytes(b'\xef\xbb\xbftext,id\na,1\nb\n"c""",2\n\n"d"e,3\n' + long + b',4\n\xff,5\nlast,6\n"open,7\n')
    found = read(path)
    assert [line for line, _ in found] == [2, 3, 4, 6, 7, 8, 9, 10]
    assert [row["text"] if isinstance(row, dict) else row.reason for _, row in found] == [
        "a", "another number of columns", 'c"', "broken CSV", TOO_LONG.reason, "\udcff", "last",
        "broken CSV, a quote is never closed: the rest of the file is unread",
    ]  # fmt: skip
    path = tmp_path / "a.parquet"
    path.write_bytes(arrow()[:-20])
    assert [row.reason for _, row in read(path)] == ["broken parquet, the rest of the file is unread"]
    offsets = pyarrow.py_buffer(np.array([0, 1, 2, 3], "<i4"))
    strings = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"a\xffb"))
    parquet.write_table(pyarrow.table({"text": strings}), path)
    found = [(line, row["text"] if isinstance(row, dict) else row.reason) for line, row in read(path)]
    assert found == [(1, "a"), (2, "not UTF-8"), (3, "b")]


def test_a_broken_list_ends_where_it_breaks(tmp_path):
    path = tmp_path / "a.json"
    for tail in (b'{"text": "x", ]', b'{"text": "\xff"}]', b'{"text": "a', b"nonsense"):
        path.write_bytes(b'[{"text": "a"}, {"text": "b"}, ' + tail)
        found = read(path)
        assert [line for line, _ in found] == [1, 2, 3]
        assert found[2][1].reason == "broken JSON, the rest of the file is unread"
    path.write_bytes(rb'[{"text": "\ud83d"}]')
    assert len(read(path)) == 1


def test_numbers_of_any_size_are_read(tmp_path):
    path = tmp_path / "a.json"
    for number in ("9" * 30, "9" * 5000, "1e999", "-0.5"):
        path.write_text(f'[{{"text": "a", "n": {number}}}, {{"text": "b"}}]')
        assert [row["text"] for _, row in read(path)] == ["a", "b"], number


def test_a_date_that_python_cannot_hold_costs_no_text(tmp_path):
    path = tmp_path / "a.parquet"
    dates = pyarrow.array([0, 1 << 62], pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "date": dates}), path)
    found = read(path)
    assert [row["text"] for _, row in found] == ["a", "b"] and found[1][1]["date"] is None


def test_long_windows_and_suffixes_in_capitals(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.JSONL.ZST").write_bytes(compressor.compress(LINES) + compressor.flush())
    assert files.data_files(tmp_path) == [tmp_path / "a.JSONL.ZST"]
    assert [row["text"] for _, row in read(tmp_path / "a.JSONL.ZST")] == TEXTS


def test_a_deeply_nested_record_is_one_reject(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(f'[{{"text": "a"}}, {{"x": {"[" * 100_000}1{"]" * 100_000}}}, "b", [], {{"text": ["c", {{}}]}}]')
    (_, first), (_, deep), *others = read(path)
    assert (first, deep) == ({"text": "a"}, InvalidRecord("nested too deep"))
    assert others == [(3, "b"), (4, []), (5, {"text": ["c", {}]})]
