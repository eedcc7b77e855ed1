"""Run directories: the lock, the choice by fingerprint, and the files that earlier versions wrote."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from engine.runs.run_folder import (
    choose_run_directory,
    is_empty,
    lock_folder,
    remove_if_empty_on_error,
)
from tests.support.checkpoints import save, trained
from tests.support.paths import ROOT
from utils.errors import UserError

FINGERPRINT = {"stage": "pretrain", "tokenizer": "t", "model": {"dim": 1}, "seed": 1}


def choose(output, resume="auto", **changes):
    settings = SimpleNamespace(
        output_path=str(output), run_name="", model_name="tiny", resume=resume, dry_run=False, write_run_path="", seed=1
    )
    return choose_run_directory(settings, "pretrain", FINGERPRINT | changes)


def make_run(folder, step=1):
    """A run directory as version 0.1 wrote it: run.json has no version."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"stage": "pretrain", "identity": FINGERPRINT}))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    save(folder, *trained(), step)
    return folder


def test_the_same_run_is_found_and_another_gets_a_directory_of_its_own(tmp_path, capsys):
    run = make_run(tmp_path / "pretrain_tiny")
    found = choose(tmp_path)
    assert (found.folder, found.checkpoint) == (run, run / "checkpoints/step-00000001") and found.summary is None
    assert choose(tmp_path, seed=2).folder == tmp_path / "pretrain_tiny_2"
    assert f"{run} differs in seed: this run goes to {run}_2" in capsys.readouterr().out
    assert choose(tmp_path, "never").folder == tmp_path / "pretrain_tiny_2"
    assert choose(tmp_path, "must").checkpoint == found.checkpoint
    with pytest.raises(UserError, match="no run to resume: .*pretrain_tiny differs in seed"):
        choose(tmp_path, "must", seed=2)


def test_a_path_is_resumed_when_its_inputs_are_the_same(tmp_path):
    run = make_run(tmp_path / "elsewhere")
    assert choose(tmp_path, str(run), seed=2).checkpoint == run / "checkpoints/step-00000001"
    for change, message in (
        ({"stage": "sft"}, "is of the stage pretrain, not sft"),
        ({"tokenizer": "other"}, "another tokenizer"),
        ({"model": {"dim": 2}}, "another architecture"),
    ):
        with pytest.raises(UserError, match=message):
            choose(tmp_path, str(run), **change)


def test_an_interrupted_start_leaves_its_directory_to_the_next_run(tmp_path):
    run = tmp_path / "pretrain_tiny"
    with pytest.raises(KeyboardInterrupt), remove_if_empty_on_error(run):
        lock_folder(run).close()
        raise KeyboardInterrupt
    assert not run.exists()
    lock_folder(run).close()
    assert is_empty(run) and choose(tmp_path, "never").folder == run


def test_the_lock_is_released_when_its_process_dies(tmp_path):
    code = "import sys, time; from pathlib import Path; from engine.runs.run_folder import lock_folder\n"
    code += "lock = lock_folder(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    run = tmp_path / "pretrain_tiny"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another process is training in .*pretrain_tiny: wait for it"):
            lock_folder(run)
        assert choose(tmp_path, "never").folder == tmp_path / "pretrain_tiny_2"
        process.kill()
    with lock_folder(run), pytest.raises(UserError, match="another process"):
        lock_folder(run)
    lock_folder(run).close()
