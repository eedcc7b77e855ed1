"""SIGKILL at random moments, some of them during a save: the same command resumes, and the result is the same."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.models import SHIPPED
from tests.support.paths import ROOT

KILLS = int(os.environ.get("KILLS", "4"))
WORKER = "tests.support.kill_worker"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("model", SHIPPED)
def test_killed_runs_equal_the_uninterrupted_one(model, tmp_path):
    """Metrics except times, samples, the best checkpoint and the sha256 of the final weights."""
    command = [sys.executable, "-m", WORKER, model, str(KILLS), str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["different"] == [] and report["kills"] == KILLS and report["inside_a_save"] > 0
