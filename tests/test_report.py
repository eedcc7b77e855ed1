"""The data report describes the token files."""

import json
import re

import pytest

from preprocess_data.pipeline.report import SAMPLES, write_report
from preprocess_data.preprocess_data import main
from tests.support.make_tokenizer import make_tokenizer
from tests.support.texts import HOSTILE, SENTENCES, write_lines
from utils.chat_template import encode_chat


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), 420)


def prepare(kind, folder, tokenizer, records):
    source = write_lines(folder / "my.jsonl", records)
    main([kind, f"--sources={source}", f"--tokenizer_path={tokenizer.path}", f"--data_path={folder}", "--workers=1"])
    return (folder / f"{kind}_report.md").read_text(encoding="utf-8")


def cells(report: str, name: str) -> list[str]:
    return re.search(rf"^\| {re.escape(name)} \| (.*) \|$", report, re.MULTILINE)[1].split(" | ")


def test_counts_samples_and_picture(tokenizer, tmp_path):
    texts = [f"{SENTENCES[i % len(SENTENCES)]}{i}# `{HOSTILE[i % len(HOSTILE)]}" for i in range(300)] + ["长" * 2000]
    report = prepare("pretrain", tmp_path, tokenizer, [{"text": text} for text in texts])
    metas = [json.loads((tmp_path / f"pretrain_{split}.meta.json").read_text()) for split in ("train", "val")]
    for what in ("documents", "tokens", "characters"):
        assert cells(report, what) == [f"{meta[what]:,}" for meta in metas]
    longest = len(tokenizer.encode("长" * 2000)) + 2
    assert cells(report, "tokens per document, longest")[0] == f"{longest:,}"
    assert (tmp_path / "pretrain_report.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.glob(".*")] == [".preprocess.lock"]
    body = report.split("## 10 documents", 1)[1]
    assert len(re.findall(r"^Document \d+", body, re.MULTILINE)) == SAMPLES
    for line in body.splitlines()[1:]:  # no line of a document is rendered as Markdown
        assert not line or line.startswith(("    ", "Document "))
    again = write_report(tmp_path, "pretrain", tokenizer).read_text(encoding="utf-8")
    other = write_report(tmp_path, "pretrain", tokenizer, seed=2).read_text(encoding="utf-8")
    assert again == report != other


def test_share_of_loss_and_long_documents(tokenizer, tmp_path):
    chats = [{"messages": [{"role": "user", "content": "x" * 10}, {"role": "assistant", "content": "y" * 900}]}] * 20
    report = prepare("sft", tmp_path, tokenizer, chats)
    ids, mask = encode_chat(tokenizer, chats[0]["messages"])
    assert cells(report, "tokens with loss")[0] == f"{20 * sum(mask):,} ({sum(mask) / len(ids):.1%})"
    assert re.search(r"Document \d+, the first 300 of \d+ tokens:", report)


def test_filtered_and_invalid_records_with_file_and_line(tokenizer, tmp_path):
    assert "## Filtered and invalid records\n\nNone.\n" in prepare("pretrain", tmp_path, tokenizer, [{"text": "好"}])
    meta = json.loads((tmp_path / "pretrain_train.meta.json").read_text())
    meta |= {"dropped": {"too short": 12_345}, "bad": {"broken JSON": 7}}
    (tmp_path / "pretrain_train.meta.json").write_text(json.dumps(meta))
    rejects = [{"file": "a|b.jsonl", "line": line, "reason": "broken JSON"} for line in range(2, 9)]
    write_lines(tmp_path / "pretrain_rejects.jsonl", rejects)
    report = write_report(tmp_path, "pretrain", tokenizer).read_text(encoding="utf-8")
    assert r"| 12,345 | too short |  |" in report
    assert r"| 7 | broken JSON | a\|b.jsonl:2, a\|b.jsonl:3, a\|b.jsonl:4 |" in report
