"""A full disk: one line that names the file, and no partial file under its name."""

import errno
import json
import os
import resource
from contextlib import contextmanager

import numpy as np
import pytest

from engine.runs.metrics import draw_curve
from preprocess_data import preprocess_data
from preprocess_data.corpora.fetching import write_jsonl
from preprocess_data.pipeline import report
from preprocess_data.pipeline.tokenizer_report import from_tokenizer, write_report
from preprocess_data.pipeline.train_bpe import save
from tests.support.make_tokenizer import make_tokenizer
from tests.support.texts import SENTENCES, write_lines
from utils.atomic import GrowingFile, write_text
from utils.errors import UserError, run_script


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), 420)


@contextmanager
def files_end_at(size: int):
    """No file of this process grows beyond so many bytes: write(2) fails with EFBIG there, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def curve(path, tokenizer):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(3)]
    metrics = path.parent.parent / "metrics.jsonl"
    metrics.write_text("\n".join(lines))
    return lambda: draw_curve(metrics, path)


WRITERS = {
    "poems.jsonl": lambda path, _: lambda: write_jsonl(path, [{"text": "明月" * 50}] * 100),
    "report.md": lambda path, tok: lambda: write_report([from_tokenizer("ours", tok)], SENTENCES, path, "these"),
    "tokenizer.json": lambda path, tok: lambda: save(tok.backend, path.parent),
    "chat_template.jinja": lambda path, tok: lambda: tok.save(path.parent),
    "summary.json": lambda path, _: lambda: write_text(path, "x" * 9000),
    "loss_curve.png": curve,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_be_written_keeps_what_it_held_and_is_named(name, tmp_path, tokenizer, capsys):
    path = tmp_path / "folder" / name
    path.parent.mkdir()
    path.write_text("before")
    write = WRITERS[name](path, tokenizer)
    with files_end_at(100), pytest.raises(SystemExit) as ended:
        run_script(write)
    message = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and message.count("\n") == 1
        and "File too large" in message
        and str(path.parent) in message
    )
    assert path.read_text() == "before"
    assert sum(file.stat().st_size for file in path.parent.iterdir() if file.name.startswith(".")) <= 100
    write()
    assert path.read_bytes() != b"before"


def test_growing_files_are_named(tmp_path):
    file = GrowingFile(tmp_path / "a.bin")
    with files_end_at(100), pytest.raises(OSError) as stopped:
        file.write(np.zeros(1000, np.uint8).tobytes())
    file.close()
    assert stopped.value.filename == str(tmp_path / "a.bin") and not (tmp_path / "a.bin").exists()


def raising(number, *path):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number), *path)

    return fails


@pytest.mark.parametrize("path,message", [((), "a file could not be written"), (("/data/a",), "/data/a")])
def test_a_full_disk_anywhere_is_one_line(path, message, capsys):
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(SystemExit):
            run_script(raising(number, *path))
        change = "make room, and run the same command again"
        assert capsys.readouterr().err == f"error: {message}: {os.strerror(number)}: {change}\n"
    with pytest.raises(ConnectionResetError):  # what is not about a file keeps its traceback
        run_script(raising(errno.ECONNRESET))


def test_a_full_disk_under_the_data_report_leaves_the_tokens(tmp_path, tokenizer, monkeypatch, capsys):
    source = write_lines(tmp_path / "my.jsonl", [{"text": SENTENCES[i % len(SENTENCES)] + str(i)} for i in range(300)])
    flags = ["pretrain", f"--sources={source}", f"--tokenizer_path={tokenizer.path}", f"--data_path={tmp_path / 'out'}",
             "--workers=1", "--encoder=tokenizers"]  # fmt: skip
    with monkeypatch.context() as full:
        full.setattr(report, "draw", raising(errno.ENOSPC))
        with pytest.raises(SystemExit):
            run_script(lambda: preprocess_data.main([*flags]))
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: {tmp_path / 'out' / 'pretrain_report.png'}: No space left on device: make room")
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"pretrain_train.bin", "pretrain_train.meta.json"} <= kept and not any("report" in name for name in kept)
    preprocess_data.main([*flags])
    assert (tmp_path / "out" / "pretrain_report.md").is_file()


def test_a_full_disk_while_meta_files_are_written_publishes_nothing(tmp_path, tokenizer, monkeypatch):
    source = write_lines(tmp_path / "my.jsonl", [{"text": SENTENCES[i % len(SENTENCES)] + str(i)} for i in range(300)])
    flags = ["pretrain", f"--sources={source}", f"--tokenizer_path={tokenizer.path}", f"--data_path={tmp_path / 'out'}",
             "--workers=1", "--encoder=tokenizers"]  # fmt: skip
    write = GrowingFile.write

    def full(file, data):
        if file.path.name.endswith(".meta.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(GrowingFile, "write", full)
        with pytest.raises(UserError, match="the disk of .* is full: make room and run the same command again"):
            preprocess_data.main([*flags])
    assert not [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    preprocess_data.main([*flags])
    assert (tmp_path / "out" / "pretrain_train.meta.json").is_file()
