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
from preprocess_data.readers.json_file import JsonLines
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
        (b"{'text': 'a'}", "broken JSON"),
        (b"[" * 5000, "nested too deep"),
        (b'{"text": "\xff"}', "not UTF-8"),
        ('{"text": "café"}'.encode("latin-1"), "not UTF-8"),
        ('{"text": "床前明月光。"}'.encode("gb18030"), "not UTF-8, perhaps GB18030"),
        ('{"text": "日本語"}'.encode("shift-jis"), "not UTF-8"),
        (b'{"text": "a\0b"}', "NUL bytes"),
        (b"\0" * 100, "NUL bytes"),
        (rb'{"text": "\ud83d"}', "lone surrogate"),
        (rb'{"text": "\ud83d", "score": NaN}', "lone surrogate"),
    ],
)
def test_invalid_lines_have_a_reason(line, reason):
    good = b'{"text": "x"}'
    found = list(JsonLines(5, b"\n".join([good, line, b" \r", good])).records())
    assert [number for number, _ in found] == [5, 6, 8]
    assert found[1][1].reason == reason and found[0][1] == found[2][1] == {"text": "x"}
    json.dumps(found[1][1].record).encode()


@pytest.mark.parametrize(
    "line,expected",
    [
        (rb'{"text": "\u6625", "score": NaN}', {"text": "春", "score": None}),
        (rb'{"text": "\ud83d\ude00", "score": -Infinity}', {"text": "😀", "score": None}),
        (b'{"text": "NaN", "list": [Infinity, 1]}', {"text": "NaN", "list": [None, 1]}),
        (b'{"text": "a", "n": 1e999}', {"text": "a", "n": float("inf")}),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", {"text": "a", "n": None}),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_numbers_that_json_does_not_have_harm_no_text(tmp_path, line, expected, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(line if suffix == ".jsonl" else b"[" + line + b"]")
    assert read(path) == [(1, expected)]


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
    for tail in (b'{"text": "x", ]', b'{"text": "a', b"nonsense", b'{"text": "a"', b""):
        path.write_bytes(b'[{"text": "a"}, {"text": "b"}, ' + tail)
        found = read(path)
        assert [line for line, _ in found] == [1, 2, 3]
        assert found[2][1].reason == "broken JSON, the rest of the file is unread"


def test_a_broken_element_of_a_list_costs_no_other(tmp_path):
    path = tmp_path / "a.json"
    elements = [b'{"text": "\xff"}', rb'{"text": "\ud83d"}', b'{"text": "a" "b"}', b"'a'", b'{"text": "]}"}']
    path.write_bytes(b"[" + b",".join(elements) + b"]")
    assert [getattr(record, "reason", record) for _, record in read(path)] == [
        "not UTF-8", "lone surrogate", "broken JSON", "broken JSON", {"text": "]}"},
    ]  # fmt: skip


RECORDS = [{"text": text} for text in TEXTS]
FORMS = {
    "one list": json.dumps(RECORDS),
    "a list over several lines": json.dumps(RECORDS, ensure_ascii=False, indent=2),
    "objects over several lines": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
    "data": json.dumps({"data": RECORDS}),
    "rows after other fields": json.dumps({"info": {"v": "1.0, [a]"}, "n": [4], "rows": RECORDS}),
    "train over several lines": json.dumps({"train": RECORDS, "license": "x"}, indent=1),
    "a list in a line": f"{json.dumps(RECORDS)}\n\n",
    "lines": LINES.decode(),
}  # fmt: skip


@pytest.mark.parametrize("block", [11, 1 << 20])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson.gz"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_json_file_is_read(tmp_path, monkeypatch, form, suffix, block):
    monkeypatch.setattr(records, "CHUNK_BYTES", block)
    path = tmp_path / f"a{suffix}"
    for start in (b"", b"\xef\xbb\xbf", b"\n \n"):
        data = start + FORMS[form].encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
        assert texts(path) == TEXTS


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_a_list_of_turns_is_one_record(tmp_path):
    path = tmp_path / "a.jsonl"
    reversed_fields = [dict(reversed(turn.items())) for turn in TURNS]
    for turns in (TURNS, reversed_fields):
        path.write_text(json.dumps(turns))
        assert read(path) == [(1, turns)]
        path.write_text(json.dumps(turns, indent=2))
        assert read(path) == [(1, turns)]
        path.write_text(f"{json.dumps(turns)}\n{json.dumps(turns)}\n")
        assert read(path) == [(1, turns), (2, turns)]
        path.write_text(json.dumps([turns, turns]))
        assert read(path) == [(1, turns), (2, turns)]
        path.write_text(json.dumps({"id": 1, "data": turns}))
        assert read(path) == [(1, {"id": 1, "data": turns})]


def test_a_second_list_in_an_object_is_one_reject(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": [{"text": "a"}], "tags": ["x"], "test": [{"text": "b"}], "n": {"x": [1]}}))
    first, (_, second) = read(path)
    assert first == (1, {"text": "a"})
    assert second == InvalidRecord("another list after that of the records is unread", '"test"')


def test_a_broken_first_line_costs_no_other(tmp_path):
    path = tmp_path / "a.jsonl"
    for first in (b"{broken", b'{"text": "a', b'{"text": "x", ', b"{", b"{}}", b'"', b"]"):
        path.write_bytes(first + b"\n" + LINES)
        (_, broken), *others = read(path)
        assert broken.reason == "broken JSON" and [record["text"] for _, record in others] == TEXTS, first


@pytest.mark.parametrize(
    "data,found",
    [
        ("[]".encode("utf-16"), "UTF-16, not UTF-8"),
        (LINES.decode().encode("utf-16-be"), "UTF-16, not UTF-8"),
        (LINES.decode().encode("utf-32"), "UTF-32, not UTF-8"),
        (gzip.compress(LINES), "gzip, not .jsonl"),
        (zstandard.compress(LINES), "zstd, not .jsonl"),
        (bz2.compress(LINES), "bzip2, not .jsonl"),
        (arrow(), "parquet, not .jsonl"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer, not .jsonl"),
    ],
)
def test_a_file_in_another_format_is_called_that(tmp_path, data, found):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    assert read(path) == [(0, InvalidRecord(f"{found}, the file is unread"))]
    if found.startswith("UTF"):
        for suffix in (".txt", ".csv", ".json"):
            path = path.with_suffix(suffix)
            path.write_bytes(data)
            assert read(path) == [(0, InvalidRecord(f"{found}, the file is unread"))]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(data))
    assert read(path) == [(0, InvalidRecord(f"{found}, the file is unread"))]


def test_long_elements_are_skipped_and_lines_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK_BYTES", 64)
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 300)
    path = tmp_path / "a.jsonl"
    long = [{"text": "x" * 500}, {"text": '\\"' * 300}, {"n": [[1, 2]] * 200}]
    values = [{"text": "a"}, long[0], {"text": "b"}, long[1], long[2], {"text": "c"}]
    path.write_text("\n".join(json.dumps(value, indent=1) for value in values))
    found = read(path)
    assert [record if record is TOO_LONG else record["text"] for _, record in found] == ["a", TOO_LONG, "b", TOO_LONG,
                                                                                         TOO_LONG, "c"]  # fmt: skip
    starts = np.cumsum([1, *(json.dumps(value, indent=1).count("\n") + 1 for value in values[:-1])])
    assert [line for line, _ in found] == starts.tolist()


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
    assert (first, deep.reason) == ({"text": "a"}, "nested too deep")
    assert others == [(3, "b"), (4, []), (5, {"text": ["c", {}]})]
