"""A fault at every system call of a save, flipped bits, full disks: a valid checkpoint is always left."""

import itertools
import os
import random
import shutil
import subprocess

import pytest

from engine.runs import checkpoint_manager
from engine.runs.checkpoint import find_checkpoints, load_training_state, newest_checkpoint, step_of, verify_checkpoint
from engine.runs.checkpoint_manager import CheckpointManager
from tests.support.checkpoints import CONFIG, config_with, save, save_with_a_fault, trained, two_checkpoints
from tests.support.faulty_disk import FaultyOS, mount_small

FLIPS = int(os.environ.get("FLIPS", "300"))


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return two_checkpoints(tmp_path_factory.mktemp("faults") / "run", *trained())


def count_calls(example, tmp_path):
    run = shutil.copytree(example[0], tmp_path / "counted")
    with pytest.MonkeyPatch.context() as patch:
        faulty = FaultyOS(patch)
        save(run, *example[1:], 3)
    return faulty.names


def test_every_kind_of_call_is_seen(example, tmp_path):
    names = count_calls(example, tmp_path)
    assert {"open", "write", "fsync", "close", "rename", "mkdir", "rmdir", "unlink"} <= set(names)
    files = list(find_checkpoints(tmp_path / "counted")[0].iterdir())
    assert names.count("fsync") == len(files) + 2  # and the folder, and the folder it is in


@pytest.mark.parametrize("fault", ["fails", "full", "short", "dies", "dies after", "dies within"])
def test_a_fault_at_every_call_of_a_save_leaves_a_valid_checkpoint(example, tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setattr(checkpoint_manager, "PAUSE_SECONDS", 0)
    names = count_calls(example, tmp_path)
    for at, name in enumerate(names):
        if name != "write" and fault in ("short", "dies within"):
            continue
        run = shutil.copytree(example[0], tmp_path / f"{fault}-{at}")
        ended, newest = save_with_a_fault(run, *example[1:], at, fault)
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
    assert verify_checkpoint(newest) is None and len(files) == 4
    for number, path in zip(range(FLIPS), itertools.cycle(files)):
        content = bytearray(path.read_bytes())
        if number % 3 == 2:
            path.write_bytes(content[: chance.randrange(len(content))])
        else:
            at = chance.randrange(len(content))
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
        assert verify_checkpoint(newest), (number, path.name)
        assert number % 50 or newest_checkpoint(run) == before
        path.write_bytes(content)
    assert verify_checkpoint(newest) is None and newest.name in capsys.readouterr().err


def test_a_checkpoint_with_a_missing_file_is_skipped(example, tmp_path):
    run = shutil.copytree(example[0], tmp_path / "run")
    newest, before = find_checkpoints(run)
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        path.unlink()
        assert newest_checkpoint(run) == before, path.name
        path.write_bytes(content)


def test_pruning_counts_valid_checkpoints_only_and_keeps_the_one_just_written(example, tmp_path):
    run = shutil.copytree(example[0], tmp_path / "run")
    flip = run / "checkpoints/step-00000002/model.safetensors"
    flip.write_bytes(flip.read_bytes()[:-1] + b"x")
    checkpoint_manager.prune_checkpoints(run, 1)
    assert [step_of(f) for f in find_checkpoints(run)] == [1]
    model, optimizer = example[1:]
    shutil.copytree(example[0] / "checkpoints/step-00000002", run / "checkpoints/step-00000009")
    flip = run / "checkpoints/step-00000009/model.safetensors"
    flip.write_bytes(flip.read_bytes()[:-1] + b"x")  # the run resumed from 1: later ones were damaged
    save(run, model, optimizer, 2)
    assert [step_of(f) for f in find_checkpoints(run)] == [2]


def test_retention_of_the_newest_every_nth_and_the_best(tmp_path):
    model, optimizer = trained()
    config = config_with(keep_last=2, keep_every=4, keep_best=True)
    saver = CheckpointManager(tmp_path, config, model, optimizer, {})
    losses = {1: 3.0, 2: 2.0, 3: 2.5, 5: float("nan"), 6: 2.2, 7: 2.1}
    for step in range(1, 11):
        val = {"step": step, "val_loss": losses[step], "val_targets": 7} if step in losses else {"step": 1}
        saver.save({"step": step, "tokens": step}, val)
    assert [step_of(f) for f in find_checkpoints(tmp_path)] == [10, 9, 8, 4, 2] and saver.best() == "step-00000002"


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
            assert verify_checkpoint(newest_checkpoint(disk)) is None
        assert "could not be saved" in capsys.readouterr().err and saver.retry_at > 190
        (disk / "other").unlink()
        saver.save({"step": 999, "tokens": 1}, {})
        assert newest_checkpoint(disk).name == "step-00000999" and saver.retry_at == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)
