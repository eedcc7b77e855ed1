"""The tests pass with another file in model/: none depends on which models are registered."""

import os
import shutil
import subprocess
import sys

import pytest

from model.new import new_file
from tests.support.paths import ROOT

# Tests that talk to a model, look at runs or make presets: those that could meet the new one.
AFFECTED = ("demo_eval", "demo_preset", "inspect", "page", "terminal")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project, tests included, with one more architecture: its name is the first in the alphabet."""
    folder = tmp_path_factory.mktemp("another") / "project"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "output", "__pycache__", ".*_cache"))
    _, name = new_file("abc", folder / "model")
    assert name == "mini_abc"
    return folder


def pytest_in(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_all_tests_are_collected_and_only_the_checks_run_over_the_new_model(project):
    collected = pytest_in(project, "--collect-only", "--no-header", "-qq", "-o", "addopts=--strict-markers")
    names = {line.split("::")[0] for line in collected.splitlines() if "mini_abc" in line}
    assert names <= {"tests/test_contract.py"}


@pytest.mark.slow
def test_the_tests_that_talk_to_models_pass(project):
    passed = pytest_in(project, *(f"tests/test_{name}.py" for name in AFFECTED))
    assert "mini_abc" not in passed
