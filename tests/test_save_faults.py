"""A fault at every system call of a save, flipped bits, full disks: a valid checkpoint is always left."""

import errno
import itertools
import os
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.runs import checkpoint_manager
from engine.runs.checkpoint import damage, find_checkpoints, load_training_state, newest_checkpoint, step_of
from engine.runs.checkpoint_manager import CheckpointManager
from engine.training.optim import build_optimizer
from tests.support.engine_helpers import TinyModel, TinyModelArgs
from utils.errors import UserError

FLIPS = int(os.environ.get("FLIPS", "300"))
CALLS = ("open", "write", "fsync", "close", "rename", "replace", "mkdir", "rmdir", "unlink")  # all that a save uses
CONFIG = SimpleNamespace(
    keep_last=1,
    keep_every=0,
    keep_best=False,
    save_interval=1,
    optimizer="muon",
    max_lr=0.01,
    betas=(0.9, 0.95),
    weight_decay=0.1,
    embed_lr_scale=1.0,
    scalar_lr_scale=1.0,
    ema=0.0,
)


class Died(BaseException):
    """Stands for the end of the process: not an Exception, and nothing touches the disk after it."""


class FaultyOS:
    """Takes the place of the calls in CALLS, and lets number `at` go wrong in a way of its own.

    fails: with an error, once. full: it and each later one that needs room. short: a write takes a single byte.
    dies: before the call. dies after: it. dies within: a write, half of it done.
    """

    def __init__(self, patch, at=-1, fault=""):
        self.at, self.fault, self.count, self.dead, self.names = at, fault, 0, False, []
        for name in CALLS:
            patch.setattr(os, name, self.stand_in(name, getattr(os, name)))

    def stand_in(self, name, call):
        def called(*args, **kwargs):
            if self.dead:
                raise Died
            now, self.count = self.count == self.at, self.count + 1
            self.names.append(name)
            needs_room = name in ("write", "mkdir") or (name == "open" and args[1] & os.O_CREAT)
            if self.fault == "full" and self.count > self.at and needs_room:
                raise OSError(errno.ENOSPC, "No space left on device")
            if now and self.fault == "fails":
                raise OSError(errno.EIO, "Input/output error")
            if now and self.fault == "short" and name == "write":
                return call(args[0], args[1][:1])
            if now and self.fault.startswith("dies"):
                self.dead = True
                if self.fault == "dies within" and name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                if self.fault == "dies after":
                    call(*args, **kwargs)
                raise Died
            return call(*args, **kwargs)

        return called


def trained(seed=0, prepare=lambda model: None):
    """A tiny model, after `prepare(model)`, and its optimizer after a step."""
    torch.manual_seed(seed)
    model = TinyModel(TinyModelArgs(vocab_size=32, max_seq_len=8))
    prepare(model)
    optimizer = build_optimizer(model, CONFIG)
    ids = torch.randint(32, (2, 8))
    model(ids, ids)[1].backward()
    optimizer.step(torch.tensor(True))
    return model, optimizer


def two_checkpoints(run, model, optimizer):
    """Make `run` a run with checkpoints 1 and 2; returns all three."""
    run.mkdir()
    config = SimpleNamespace(**{**vars(CONFIG), "keep_last": 2})
    for step in (1, 2):
        CheckpointManager(run, config, model, optimizer, {"stage": "pretrain"}).save({"step": step, "tokens": step}, {})
    return run, model, optimizer


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return two_checkpoints(tmp_path_factory.mktemp("faults") / "run", *trained())


def save(run, model, optimizer, step):
    CheckpointManager(run, CONFIG, model, optimizer, {"stage": "pretrain"}).save(
        {"step": step, "tokens": step}, {}, must=True
    )


def count_calls(example, tmp_path):
    run = shutil.copytree(example[0], tmp_path / "counted")
    with pytest.MonkeyPatch.context() as patch:
        faulty = FaultyOS(patch)
        save(run, *example[1:], 3)
    return faulty.names


def test_every_kind_of_call_is_seen(example, tmp_path):
    names = count_calls(example, tmp_path)
    assert {"open", "write", "fsync", "close", "rename", "mkdir", "rmdir", "unlink"} <= set(names)
    assert names.count("fsync") == 6  # four files, the folder, and the folder it is in


@pytest.mark.parametrize("fault", ["fails", "full", "short", "dies", "dies after", "dies within"])
def test_a_fault_at_every_call_of_a_save_leaves_a_valid_checkpoint(example, tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setattr(checkpoint_manager, "PAUSE_SECONDS", 0)
    names = count_calls(example, tmp_path)
    for at, name in enumerate(names):
        if name != "write" and fault in ("short", "dies within"):
            continue
        run, ended = shutil.copytree(example[0], tmp_path / f"{fault}-{at}"), "saved"
        with pytest.MonkeyPatch.context() as patch:
            FaultyOS(patch, at, fault)
            try:
                save(run, *example[1:], 3)
            except UserError as error:
                assert "could not be saved" in str(error)
                ended = "refused"
            except Died:
                ended = "died"
        newest = newest_checkpoint(run)
        assert newest is not None and step_of(newest) in ((3,) if ended == "saved" else (2, 3)), (fault, at, name)
        assert fault != "short" or ended == "saved"
        state = load_training_state(newest, *trained(1))
        assert state["step"] == step_of(newest), (fault, at, name)
        save(run, *example[1:], 4)  # the next process
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left == ["step-00000004"], (fault, at, name)


def test_every_flipped_bit_and_truncation_is_found(example, tmp_path, capsys):
    run, chance = shutil.copytree(example[0], tmp_path / "run"), random.Random(0)
    newest, before = find_checkpoints(run)
    files = sorted(newest.iterdir())
    assert damage(newest) is None and len(files) == 4
    for number, path in zip(range(FLIPS), itertools.cycle(files)):
        content = bytearray(path.read_bytes())
        if number % 3 == 2:
            path.write_bytes(content[: chance.randrange(len(content))])
        else:
            at = chance.randrange(len(content))
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
        assert damage(newest), (number, path.name)
        assert number % 50 or newest_checkpoint(run) == before
        path.write_bytes(content)
    assert damage(newest) is None and newest.name in capsys.readouterr().err


def test_a_checkpoint_with_a_missing_file_is_skipped(example, tmp_path):
    run = shutil.copytree(example[0], tmp_path / "run")
    newest, before = find_checkpoints(run)
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        path.unlink()
        assert newest_checkpoint(run) == before, path.name
        path.write_bytes(content)


def test_pruning_counts_whole_checkpoints_only_and_never_the_one_just_written(example, tmp_path):
    run = shutil.copytree(example[0], tmp_path / "run")
    flip = run / "checkpoints/step-00000002/model.safetensors"
    flip.write_bytes(flip.read_bytes()[:-1] + b"x")
    checkpoint_manager.prune_checkpoints(run, 1)
    assert [step_of(f) for f in find_checkpoints(run)] == [1]
    model, optimizer = example[1:]
    shutil.copytree(example[0] / "checkpoints/step-00000002", run / "checkpoints/step-00000009")
    flip = run / "checkpoints/step-00000009/model.safetensors"
    flip.write_bytes(flip.read_bytes()[:-1] + b"x")  # the run went on from 1: what is beyond was damaged
    save(run, model, optimizer, 2)
    assert [step_of(f) for f in find_checkpoints(run)] == [2]


def test_the_last_ones_every_nth_and_the_best_are_kept(tmp_path):
    model, optimizer = trained()
    config = SimpleNamespace(**{**vars(CONFIG), "keep_last": 2, "keep_every": 4, "keep_best": True})
    saver = CheckpointManager(tmp_path, config, model, optimizer, {})
    losses = {1: 3.0, 2: 2.0, 3: 2.5, 5: float("nan"), 6: 2.2, 7: 2.1}
    for step in range(1, 11):
        val = {"step": step, "val_loss": losses[step], "val_targets": 7} if step in losses else {"step": 1}
        saver.save({"step": step, "tokens": step}, val)
    assert [step_of(f) for f in find_checkpoints(tmp_path)] == [10, 9, 8, 4, 2] and saver.best() == "step-00000002"


def mount_small(folder: Path, size: str) -> bool:
    folder.mkdir()
    return (
        shutil.which("mount") is not None
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )


def test_a_disk_that_is_really_full(tmp_path, monkeypatch, capsys):
    """A tmpfs with room for one checkpoint and some: each later save fails, and once there is room it succeeds."""
    monkeypatch.setattr(checkpoint_manager, "PAUSE_SECONDS", 0)
    disk = tmp_path / "disk"
    if not mount_small(disk, "200k"):
        pytest.skip("no right to mount a tmpfs")
    try:
        model, optimizer = trained()
        saver = CheckpointManager(disk, CONFIG, model, optimizer, {})
        saver.save({"step": 1, "tokens": 1}, {})
        for filled in range(0, 200, 4):  # from room for all of it down to none
            (disk / "other").write_bytes(b"")
            try:
                (disk / "other").write_bytes(b"x" * filled * 1024)
            except OSError:
                pass
            saver.save({"step": 2 + filled, "tokens": 1}, {})
            assert damage(newest_checkpoint(disk)) is None
        assert "could not be saved" in capsys.readouterr().err and saver.retry_at > 190
        (disk / "other").unlink()
        saver.save({"step": 999, "tokens": 1}, {})
        assert newest_checkpoint(disk).name == "step-00000999" and saver.retry_at == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)
