"""Every kind of file, packed in every way, whole, damaged and cut off."""

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

from preprocess_data.readers import files
from preprocess_data.readers.decompress import PACKINGS
from preprocess_data.readers.files import LONGEST, TOO_LONG, InvalidRecord, JsonLines, read_file, whole_lines

TEXTS = ["第一篇。", 'second, "quoted"', "两行，\n一篇", "é🙂"]
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


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


def rows(path) -> list[tuple[int, object]]:
    return [row for part in read_file(path) for row in part.records()]


def texts(path) -> list:
    found = [row["text"] if isinstance(row, dict) else row for _, row in rows(path)]
    return [text.replace("\r", "") if isinstance(text, str) else text for text in found]


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", FILES)
def test_every_kind_in_every_packing_gives_the_same_records(tmp_path, monkeypatch, kind, packing, block):
    monkeypatch.setattr(files, "BLOCK", block)
    path = tmp_path / f"a{kind}{packing}"
    path.write_bytes(PACK[packing](FILES[kind]))
    assert texts(path) == TEXTS
    if kind not in (".parquet", ".csv", ".tsv"):
        path.write_bytes(PACK[packing](b"\xef\xbb\xbf" + FILES[kind]))
        assert texts(path) == TEXTS


@pytest.mark.parametrize("kind", [".jsonl", ".txt", ".csv"])
def test_records_know_their_lines(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "BLOCK", 10)
    path = tmp_path / f"a{kind}"
    path.write_bytes(FILES[kind])
    starts = {".jsonl": [1, 2, 3, 4], ".txt": [1, 3, 5, 8], ".csv": [2, 3, 4, 6]}  # the third text has two lines
    assert [line for line, _ in rows(path)] == starts[kind]


@pytest.mark.parametrize("packing", [p for p in PACK if p])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_what_can_be_read_of_a_file_that_was_cut_off_is_kept_and_the_rest_is_one_reject(tmp_path, kind, packing):
    many = [f"第{i}篇 {i * 2654435761 % 2**32:x}" for i in range(20_000)]
    whole = {
        ".jsonl": "".join(json.dumps({"text": text}) + "\n" for text in many),
        ".json": json.dumps([{"text": text} for text in many]),
        ".csv": "text\n" + "".join(f'"{text}"\n' for text in many),
        ".txt": "\n\n".join(many),
    }[kind]
    packed = PACK[packing](whole.encode())
    path = tmp_path / f"a{kind}{packing}"
    cut = packed[: len(packed) * 2 // 3]
    path.write_bytes(cut)
    *kept, last = texts(path)
    assert last.reason == f"truncated {PACKINGS[packing][0]}, the rest of the file is unread"
    assert kept == many[: len(kept)] and (len(kept) > 1000 or packing == ".bz2")  # which has blocks of 900 kB
    path.write_bytes(cut + b"\xff" * 5000)  # some packings notice a little late
    *kept, last = texts(path)
    assert last.reason.endswith("the rest of the file is unread") and kept[:5000] == many[: len(kept)][:5000]
    path.write_bytes(b"not packed at all")
    assert [type(text) for text in texts(path)] == [InvalidRecord]


def test_members_and_padding(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES[:30]) + gzip.compress(LINES[30:]) + b"\0" * 10_000)
    assert texts(path) == TEXTS


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
def test_broken_lines_say_why(line, reason):
    good = b'{"text": "x"}'
    found = list(JsonLines(5, b"\n".join([good, line, b" \r", good])).records())
    assert [number for number, _ in found] == [5, 6, 8]
    assert found[1][1].reason == reason and found[0][1] == found[2][1] == {"text": "x"}
    json.dumps(found[1][1].record).encode()


@pytest.mark.parametrize("ends", [(b"\n",), (b"\n\n", b"\n\r\n")])
@pytest.mark.parametrize("block", [1 << 8, 1 << 12])
def test_an_endless_line_is_one_reject_and_is_never_held(monkeypatch, ends, block):
    monkeypatch.setattr(files, "BLOCK", block)
    monkeypatch.setattr(files, "LONGEST", limit := 20 * block)
    end = ends[0]
    for before in (0, 1, block - 1, block, block + 1):
        data = b"a" * before + end + b"x" * (limit + 3 * block) + end + b"b" + end + b"y" * (limit + 2 * block)
        found = list(whole_lines(io.BytesIO(data), ends))
        good = b"".join(part for _, part in found if isinstance(part, bytes))
        assert good.replace(b"\n", b"") == b"a" * before + b"b"
        assert [line for line, part in found if part is TOO_LONG] == [1 + len(end), 1 + 3 * len(end)]


def test_odd_tables(tmp_path):
    path = tmp_path / "a.csv"
    long = b"x" * (LONGEST + 10)
    path.write_bytes(b'\xef\xbb\xbftext,id\na,1\nb\n"c""",2\n\n"d"e,3\n' + long + b',4\n\xff,5\nlast,6\n"open,7\n')
    found = rows(path)
    assert [line for line, _ in found] == [2, 3, 4, 6, 7, 8, 9, 10]
    assert [row["text"] if isinstance(row, dict) else row.reason for _, row in found] == [
        "a", "another number of columns", 'c"', "broken CSV", TOO_LONG.reason, "\udcff", "last",
        "broken CSV, a quote is never closed: the rest of the file is unread",
    ]  # fmt: skip
    path = tmp_path / "a.parquet"
    path.write_bytes(arrow()[:-20])
    assert [row.reason for _, row in rows(path)] == ["broken parquet, the rest of the file is unread"]
    offsets = pyarrow.py_buffer(np.array([0, 1, 2, 3], "<i4"))
    strings = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"a\xffb"))
    parquet.write_table(pyarrow.table({"text": strings}), path)
    found = [(line, row["text"] if isinstance(row, dict) else row.reason) for line, row in rows(path)]
    assert found == [(1, "a"), (2, "not UTF-8"), (3, "b")]


def test_a_broken_list_ends_where_it_breaks(tmp_path):
    path = tmp_path / "a.json"
    for tail in (b'{"text": "x", ]', b'{"text": "\xff"}]', b'{"text": "a', b"nonsense"):
        path.write_bytes(b'[{"text": "a"}, {"text": "b"}, ' + tail)
        found = rows(path)
        assert [line for line, _ in found] == [1, 2, 3]
        assert found[2][1].reason == "broken JSON, the rest of the file is unread"
    path.write_bytes(rb'[{"text": "\ud83d"}]')
    print(rows(path))


def test_numbers_of_any_size_do_not_end_a_list(tmp_path):
    path = tmp_path / "a.json"
    for number in ("9" * 30, "9" * 5000, "1e999", "-0.5"):
        path.write_text(f'[{{"text": "a", "n": {number}}}, {{"text": "b"}}]')
        assert [row["text"] for _, row in rows(path)] == ["a", "b"], number


def test_a_date_that_python_cannot_hold_costs_no_text(tmp_path):
    path = tmp_path / "a.parquet"
    dates = pyarrow.array([0, 1 << 62], pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "date": dates}), path)
    found = rows(path)
    assert [row["text"] for _, row in found] == ["a", "b"] and found[1][1]["date"] is None


def test_long_windows_and_suffixes_in_capitals(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.JSONL.ZST").write_bytes(packer.compress(LINES) + packer.flush())
    assert files.data_files(tmp_path) == [tmp_path / "a.JSONL.ZST"]
    assert [row["text"] for _, row in rows(tmp_path / "a.JSONL.ZST")] == TEXTS


def test_a_record_nested_without_end_is_one_reject(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(f'[{{"text": "a"}}, {{"x": {"[" * 100_000}1{"]" * 100_000}}}, "b", [], {{"text": ["c", {{}}]}}]')
    (_, first), (_, deep), *others = rows(path)
    assert (first, deep) == ({"text": "a"}, InvalidRecord("nested too deep"))
    assert others == [(3, "b"), (4, []), (5, {"text": ["c", {}]})]
