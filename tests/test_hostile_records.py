"""Hostile records: no crash, every one is counted, and what is kept equals an independent parse of the line."""

import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from preprocess_data.pipeline import prepare as prepare_module
from preprocess_data.preprocess_data import main
from preprocess_data.readers.chat import to_messages
from preprocess_data.readers.records import InvalidRecord
from tests.support.make_tokenizer import make_tokenizer
from tests.support.texts import HOSTILE
from utils.text import clean_text

RECORDS = int(os.environ.get("RECORDS", 100))
AN_EXAMPLE = 25

any_text = st.text(st.characters(exclude_categories=[]), max_size=30) | st.sampled_from(HOSTILE)
any_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=5,
)
any_record = any_value | st.fixed_dictionaries({"text": any_text | any_value}) | st.dictionaries(any_text, any_value)
turns = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "weight", "train_detail", "thinking", "tool_calls"]),
        any_text | any_value,
        max_size=5,
    )
    | st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "bot", "x"]), "content": any_text},
        optional={"loss": any_value, "masked": any_value, "reasoning": any_value, "name": any_value},
    ),
    max_size=3,
)
pair = {"q": any_text, "a": any_text, "history": st.lists(st.lists(any_text, max_size=3), max_size=2)}
chat_record = st.dictionaries(
    st.sampled_from(
        "messages conversations q a input output instruction history system data prompt completion loss_mask metadata "
        "label tools".split()
    ),
    turns | any_text | any_value,
    max_size=5,
) | st.fixed_dictionaries(pair)


def lines_of(record):
    """A record as a line: intact, truncated, with random bytes in it, or not JSON at all."""
    written = st.tuples(record, st.booleans()).map(
        lambda pair: json.dumps(pair[0], ensure_ascii=pair[1]).encode("utf-8", "surrogatepass").replace(b"\n", b" ")
    )
    cut = st.tuples(written, st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]])
    hit = st.tuples(written, st.integers(0, 60), st.binary(min_size=1, max_size=3)).map(
        lambda found: found[0][: found[1]] + found[2] + found[0][found[1] :]
    )
    return (written | written | cut | hit | st.binary(max_size=20)).map(lambda line: line.replace(b"\n", b" "))


def strictly(line: bytes):
    """The value of a line by the JSON standard, with null for NaN and infinities, or None."""
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=lambda name: None)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # no lone surrogate anywhere
        return value
    except (ValueError, RecursionError):
        return None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), 420)


def prepare(kind, folder, tokenizer, lines, end=b"\n"):
    source = folder / "hostile.jsonl"
    source.write_bytes(end.join([b'{"q": "x", "a": "y", "text": "first"}', *lines]))
    main([kind, f"--sources={source}", f"--tokenizer_path={tokenizer.path}", f"--data_path={folder}", "--workers=1",
          "--max_bad_ratio=1", "--encoder=tokenizers"])  # fmt: skip
    metas = [json.loads((folder / f"{kind}_{split}.meta.json").read_text()) for split in ("train", "val")]
    rejects = folder / f"{kind}_rejects.jsonl"
    rejected = [json.loads(line) for line in rejects.open("rb")] if rejects.exists() else []
    assert sum(metas[0]["bad"].values()) == len(rejected)
    assert set(metas[0]["dropped"]) <= {"no answer with loss"}
    assert all(reject["reason"] in metas[0]["bad"] and reject["file"] == str(source) for reject in rejected)
    filled = [number for number, line in enumerate(lines, 2) if line.strip()]
    kept = sum(meta["documents"] for meta in metas)
    assert 1 + len(filled) == kept + sum(metas[0]["dropped"].values()) + len(rejected)
    bad = [reject["line"] for reject in rejected]
    assert len(set(bad)) == len(bad) and set(bad) <= set(filled)
    return set(filled) - set(bad)


def prepare_quickly(kind, tmp_path_factory, tokenizer, lines):
    """A new folder, and what `prepare` returns for it; without the report."""
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "write_report", lambda *_: "none")
        return folder, prepare(kind, folder, tokenizer, lines)


def hostile():
    """Settings for RECORDS records in all, half of them for each kind of record."""
    return settings(max_examples=max(1, RECORDS // AN_EXAMPLE // 2), deadline=None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck))  # fmt: skip


@hostile()
@given(lines=st.lists(lines_of(any_record), min_size=AN_EXAMPLE, max_size=AN_EXAMPLE))
def test_documents(tmp_path_factory, tokenizer, lines):
    folder, good = prepare_quickly("pretrain", tmp_path_factory, tokenizer, lines)
    expected = {}
    for number, line in enumerate(lines, 2):
        value = strictly(line)
        text = value.get("text") if isinstance(value, dict) else value
        if isinstance(text, str) and (text := clean_text(text)):
            expected[number] = text
    assert good == set(expected)
    found = []
    for split in ("train", "val"):
        tokens = np.fromfile(folder / f"pretrain_{split}.bin", "<u2")
        starts = np.load(folder / f"pretrain_{split}.docs.npy")
        parts = np.split(tokens, starts[1:].astype(int)) if len(starts) else []
        found += [tokenizer.decode(part[1:-1].tolist(), skip_special=False) for part in parts]
    assert sorted(found) == sorted([*expected.values(), "first"])


@hostile()
@given(lines=st.lists(lines_of(chat_record), min_size=AN_EXAMPLE, max_size=AN_EXAMPLE))
def test_chat_examples(tmp_path_factory, tokenizer, lines):
    _, good = prepare_quickly("sft", tmp_path_factory, tokenizer, lines)
    readable = {number for number, line in enumerate(lines, 2) if strictly(line) is not None}
    assert good == {n for n in readable if not isinstance(to_messages(strictly(lines[n - 2])), InvalidRecord)}


def test_known_trouble(tmp_path, tokenizer):
    lines = [json.dumps({"text": text}).encode() for text in HOSTILE]
    bad = [b"\0\0", b"\xef\xbb\xbf{}", b'"' + b"x" * 100, rb'{"text": "\ud800"}']
    good = prepare("pretrain", tmp_path, tokenizer, [*lines, b"\r", *bad], b"\r\n")
    assert good == {number for number, text in enumerate(HOSTILE, 2) if clean_text(text)}
