"""Preprocessing killed, on a full disk, or next to another run: the files equal those of an uninterrupted run."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preprocess_data.pipeline import prepare
from preprocess_data.pipeline.prepare_run import PrepareRun
from preprocess_data.preprocess_data import main
from tests.support.make_tokenizer import make_tokenizer
from tests.support.paths import ROOT
from tests.support.texts import HOSTILE, SENTENCES, write_lines
from utils.atomic import GrowingFile
from utils.errors import UserError

WORKER = "tests.support.preprocess_worker"
KILLS = int(os.environ.get("KILLS", 3))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), 420)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """What is tested happens before the report."""
    monkeypatch.setattr(prepare, "write_report", lambda *_: "none")


def make_source(path: Path, count: int) -> Path:
    random_ = random.Random(1)
    texts = ("".join(random_.choices([*SENTENCES, *HOSTILE], k=6)) + str(i % (count // 2)) for i in range(count))
    rows = [{"text": text} for text in texts]
    return write_lines(path, [*rows[: count // 3], "{", *rows[count // 3 :]])


def command(kind, source, tokenizer, out, *flags) -> list[str]:
    return [kind, f"--sources={source}", f"--tokenizer_path={tokenizer.path}", f"--data_path={out}",
            "--max_bad_ratio=0.1", "--dedup=exact", "--encoder=tokenizers", *flags]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a run, without its report and its lock."""
    paths = [path for path in folder.iterdir() if "report" not in path.name and path.suffix != ".lock"]
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.slow
def test_killed_at_any_moment_a_plain_rerun_gives_the_same_files(tokenizer, tmp_path):
    source, random_, kills = make_source(tmp_path / "a.jsonl", 40_000), random.Random(KILLS), 0

    def start(out, workers):
        argv = [sys.executable, "-m", WORKER, *command("pretrain", source, tokenizer, out, f"--workers={workers}")]
        argv.remove("--encoder=tokenizers")
        return subprocess.Popen(argv, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, text=True)

    began = time.time()
    assert start(tmp_path / "uninterrupted", 2).wait() == 0
    seconds, expected, resumed = time.time() - began, contents(tmp_path / "uninterrupted"), 0
    assert len(expected) == 7 and not any(name.startswith(".") for name in expected)
    while True:
        process = start(tmp_path / "out", random_.choice([1, 2]))
        try:
            assert process.wait(random_.uniform(0.2, seconds) if kills < KILLS else None) == 0
            resumed += "resuming after" in process.stdout.read()
            assert contents(tmp_path / "out") == expected
            if kills == KILLS:
                break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        until = time.time() + 20
        while time.time() < until:  # workers do not outlive it
            try:
                os.killpg(process.pid, 0)
                time.sleep(0.05)
            except ProcessLookupError:
                break
        else:
            pytest.fail("workers were left behind")
    print(f"{kills} kills, {resumed} complete runs resumed a killed one")


class Crash(BaseException):
    pass


def test_a_crash_at_every_step_of_writing(tokenizer, tmp_path, monkeypatch):
    """Each call that changes the folder in turn is the last one that a run makes."""
    monkeypatch.setattr("preprocess_data.readers.records.CHUNK_BYTES", 3000)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", -1.0)
    source, left = make_source(tmp_path / "a.jsonl", 120), None

    def counted(owner, name, half=None):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            nonlocal left
            if left is not None:
                left -= 1
                if left < 0:
                    if half:
                        half(real, *args)
                    raise Crash
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(GrowingFile, "write", lambda real, file, data: real(file, bytes(data)[: len(data) // 2]))
    counted(os, "fsync")
    counted(os, "replace")
    counted(Path, "unlink")

    def attempt(out, kind, steps=None):
        nonlocal left
        left = steps
        main(command(kind, source, tokenizer, out, "--workers=1"))

    attempt(tmp_path / "uninterrupted", "pretrain")
    expected, steps = contents(tmp_path / "uninterrupted"), 0
    step = 1 if KILLS > 3 else 7
    while True:
        out = tmp_path / f"out{steps}"
        try:
            attempt(out, "pretrain", steps)
            break
        except Crash:
            for name, data in contents(out).items():
                assert name.startswith(".") or data == expected[name]
            attempt(out, "pretrain")
        assert contents(out) == expected
        steps += step
    assert steps > 50


def test_full_disk_is_one_line_and_a_rerun_resumes(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("preprocess_data.readers.records.CHUNK_BYTES", 3000)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", -1.0)
    source, real, room = make_source(tmp_path / "a.jsonl", 400), GrowingFile.write, 20_000

    def write(file, data):
        nonlocal room
        data = bytes(data)
        real(file, data[:room])
        room -= min(room, len(data))
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")

    main(command("pretrain", source, tokenizer, tmp_path / "uninterrupted", "--workers=1"))
    monkeypatch.setattr(GrowingFile, "write", write)
    with pytest.raises(UserError, match="disk of .* is full: make room and run the same command again") as error:
        main(command("pretrain", source, tokenizer, tmp_path / "out", "--workers=1"))
    assert "\n" not in str(error.value) and all(name.startswith(".") for name in contents(tmp_path / "out"))
    monkeypatch.setattr(GrowingFile, "write", real)
    main(command("pretrain", source, tokenizer, tmp_path / "out", "--workers=1"))
    assert "resuming after" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


def test_other_settings_or_input_start_again(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("preprocess_data.readers.records.CHUNK_BYTES", 3000)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", -1.0)
    source = make_source(tmp_path / "a.jsonl", 400)
    real, adds = PrepareRun.add, 0

    def add(*args):
        nonlocal adds
        adds += 1
        if adds == 4:
            raise Crash
        real(*args)

    def stopped():
        nonlocal adds
        adds = 0
        monkeypatch.setattr(PrepareRun, "add", add)
        with pytest.raises(Crash):
            main(command("pretrain", source, tokenizer, tmp_path / "out", "--workers=1"))
        monkeypatch.setattr(PrepareRun, "add", real)
        capsys.readouterr()

    for change in ("--max_characters=30", "input", "neutral"):
        stopped()
        flags = [change] if change.startswith("--") else []
        if change == "input":
            with open(source, "ab") as file:
                file.write(b'{"text": "one more"}\n')
        main(command("pretrain", source, tokenizer, tmp_path / "out", "--workers=1", *flags))
        assert ("resuming after" in capsys.readouterr().out) == (change == "neutral")
        main(command("pretrain", source, tokenizer, tmp_path / "new", "--workers=1", *flags))
        assert contents(tmp_path / "out") == contents(tmp_path / "new")
    stopped()
    (tmp_path / "out" / ".pretrain_train.bin.partial").write_bytes(b"")
    with pytest.raises(
        UserError, match="does not hold the .* bytes .*: delete .*.pretrain_progress.json to start again"
    ):
        main(command("pretrain", source, tokenizer, tmp_path / "out", "--workers=1"))


def test_one_run_at_a_time(tokenizer, tmp_path):
    with PrepareRun(tmp_path, "pretrain", tokenizer, "a"):
        with pytest.raises(UserError, match="another run is writing"):
            PrepareRun(tmp_path, "pretrain", tokenizer, "a")
    PrepareRun(tmp_path, "pretrain", tokenizer, "a").__exit__(None, None, None)


def test_duplicates_are_dropped_in_the_order_of_the_input(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocess_data.readers.records.CHUNK_BYTES", 2000)
    random_ = random.Random(1)
    long = ["".join(chr(random_.randrange(0x4E00, 0x9FA0)) for _ in range(200)) for _ in range(40)]
    near = [text + "。尾" for text in long]
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in [*long, *long[::-1], *near]])
    for kind, expected in (("exact", {"duplicate": 40}), ("near", {"duplicate": 40, "near duplicate": 40})):
        metas = []
        for workers in (1, 2):
            out = tmp_path / f"{kind}{workers}"
            main(["pretrain", f"--sources={source}", f"--tokenizer_path={tokenizer.path}", f"--data_path={out}",
                  f"--dedup={kind}", f"--workers={workers}", "--encoder=tokenizers"])  # fmt: skip
            metas.append([json.loads((out / f"pretrain_{s}.meta.json").read_text()) for s in ("train", "val")])
        assert metas[0] == metas[1] and metas[0][0]["dropped"] == expected
        assert sum(meta["documents"] for meta in metas[0]) == 120 - sum(expected.values())
