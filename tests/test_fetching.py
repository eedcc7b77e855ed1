"""The commands that fetch corpora, with fake clients: how success and failure are handled."""

import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile

import pytest

from preprocess_data.corpora import fetching
from utils.errors import UserError

NAME = "mobvoi_seq_monkey_general_open_corpus.jsonl"
# Writes the file of the pattern as the client does, next to the target, then renamed. FAKE selects the outcome.
CLIENT = """#!/usr/bin/env bash
set -eu
[ "$1 $3 $4 $5 $7" = "download --repo-type dataset --include --local-dir" ] || exit 64
echo "$FAKE $2 $6" >> "$LOG"
case $FAKE in
    offline) echo "error: Network is unreachable" >&2; exit 1 ;;
    damaged) echo "error: Hash mismatch" >&2; exit 1 ;;
    half) mkdir -p "$8/.temp"; head -c 10 "$DATA" > "$8/.temp/part"; exit 1 ;;
    nothing) exit 0 ;;
esac
if [ -e "$8/.temp/part" ]; then echo "went on" >> "$LOG"; fi
cp "$DATA" "$8/${6/\\*/data}"
"""


@pytest.fixture
def script(tmp_path):
    """script(which, fake, data): the finished process of a download script, in a copy of its folder."""
    folder = tmp_path / "repo" / "preprocess_data"
    folder.mkdir(parents=True)
    for path in ("modelscope", "download_tokenizer_data", "download_pretrain_data", "download_sft_data"):
        shutil.copy(f"preprocess_data/{path}.sh", folder)
    client = tmp_path / "bin" / "modelscope"
    client.parent.mkdir()
    client.write_text(CLIENT)
    client.chmod(client.stat().st_mode | stat.S_IEXEC)

    def run(which, fake, data=b'{"text": "x"}\n', path=f"{client.parent}:{os.environ['PATH']}"):
        (tmp_path / "data").write_bytes(data)
        env = {"PATH": path, "FAKE": fake, "DATA": str(tmp_path / "data"), "LOG": str(tmp_path / "log")}
        command = [shutil.which("bash"), str(folder / f"download_{which}_data.sh")]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    run.corpora, run.log = tmp_path / "repo" / "output" / "corpora", tmp_path / "log"
    return run


def archive_of(lines: bytes) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:bz2") as archive:
        member = tarfile.TarInfo(NAME)
        member.size = len(lines)
        archive.addfile(member, io.BytesIO(lines))
    return data.getvalue()


@pytest.mark.parametrize(
    "which,path", [("tokenizer", "wikipedia-cn/data.json"), ("sft", "deepctrl-sft/sft_data_zh.jsonl")]
)
def test_a_file_is_downloaded_and_the_next_command_is_named(script, which, path):
    done = script(which, "ok")
    assert done.returncode == 0 and "Next: python" in done.stderr
    assert (script.corpora / path).read_bytes() == b'{"text": "x"}\n'


@pytest.mark.parametrize("fake", ["offline", "damaged", "half"])
def test_after_a_failure_one_line_says_what_to_do_and_a_rerun_resumes(script, fake):
    done = script("sft", fake)
    errors = [line for line in done.stderr.splitlines() if "could not download deepctrl/deepctrl-sft-data" in line]
    assert done.returncode == 2 and len(errors) == 1 and "run this again" in errors[0] and "done." not in done.stderr
    assert not (script.corpora / "deepctrl-sft" / "sft_data_zh.jsonl").exists()
    assert script("sft", "ok").returncode == 0
    assert ("went on" in script.log.read_text()) == (fake == "half")


def test_a_repository_without_the_file_is_an_error(script):
    done = script("sft", "nothing")
    assert done.returncode == 2 and "no longer has a file sft_data_zh.jsonl" in done.stderr


def test_without_the_client_it_says_what_to_install(script, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("dirname", "mkdir", "find"):
        (tools / name).symlink_to(shutil.which(name))
    done = script("sft", "ok", path=str(tools))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install modelscope" in done.stderr


def test_a_compressed_corpus_is_decompressed_once(script):
    rows = b'{"text": "one"}\n' * 1000
    assert script("pretrain", "ok", archive_of(rows)).returncode == 0
    folder = script.corpora / "seq-monkey"
    assert [path.name for path in folder.iterdir()] == [NAME] and (folder / NAME).read_bytes() == rows
    assert script("pretrain", "offline").returncode == 0  # nothing left to download


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_archive_leaves_nothing_under_the_final_name(script, damage):
    rows = b"".join(json.dumps({"text": str(i**9)}).encode() + b"\n" for i in range(9000))
    intact = archive_of(rows)
    middle = len(intact) // 2
    damaged = intact[:middle] + (b"" if damage == "cut" else bytes([intact[middle] ^ 255]) + intact[middle + 1 :])
    done = script("pretrain", "ok", damaged)
    assert done.returncode == 2 and "cannot be decompressed" in done.stderr
    assert not (script.corpora / "seq-monkey" / NAME).exists()
    assert script("pretrain", "ok", intact).returncode == 0
    assert (script.corpora / "seq-monkey" / NAME).read_bytes() == rows


def archives(folder):
    """A package of each kind, as the registries keep them, by file name."""
    with tarfile.open(folder / "p-1.0.tgz", "w:gz") as archive:
        data = os.urandom(100_000)
        member = tarfile.TarInfo("package/data")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    with zipfile.ZipFile(folder / "p-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("data", os.urandom(100_000))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind,name", [("npm", "p-1.0.tgz"), ("pip", "p-1.0-py3-none-any.whl")])
def test_a_kept_package_is_used_if_intact_and_fetched_again_if_not(tmp_path, monkeypatch, kind, name):
    (tmp_path / "from").mkdir()
    intact, folder, fetched = archives(tmp_path / "from")[name], tmp_path / "to", []

    def download(command, where, what):
        assert not (where / name).exists(), "pip keeps a file that is there"
        fetched.append(command[-1])
        (where / name).write_bytes(intact)

    monkeypatch.setattr(fetching, "_run", download)
    monkeypatch.setattr(fetching, "_npm", lambda: ["npm"])

    def fetch():
        return fetching.npm_pack("p@1.0", folder) if kind == "npm" else fetching.pip_download("p==1.0", folder)

    assert fetch() == fetch() == folder / name and len(fetched) == 1
    middle = len(intact) // 2
    for damaged in (b"", intact[:middle], intact[:middle] + bytes([intact[middle] ^ 255]) + intact[middle + 1 :]):
        (folder / name).write_bytes(damaged)
        assert fetch().read_bytes() == intact
    assert len(fetched) == 4


def test_a_registry_out_of_reach_is_one_line(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\necho 'npm error network' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="could not fetch npm package p@1.0 .*ENOTFOUND.*check the network") as error:
        fetching.npm_pack("p@1.0", tmp_path / "to")
    assert "\n" not in str(error.value)
    done = subprocess.run(
        [sys.executable, "-m", "preprocess_data.preprocess_data", "fetch", "poems", f"--corpora_path={tmp_path}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: could not fetch") and done.stderr.count("\n") == 1
    assert not (tmp_path / "poems.jsonl").exists()


@pytest.mark.parametrize(
    "message,change", [("npm error code ENOSPC", "make room for"), ("ERROR: x", "check the network")]
)
def test_a_full_disk_while_fetching_is_not_the_network(tmp_path, message, change):
    with pytest.raises(UserError, match=change):
        fetching._run([sys.executable, "-c", f"raise SystemExit({message!r})"], tmp_path, "a package")
