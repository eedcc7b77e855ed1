"""A decode step that becomes compiled while it answers: the building process, the folder, what may go wrong.

The worker here is a short script that writes what a real one would; tests/test_prepare.py compiles real models.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from engine.inference import compiling
from engine.inference.chat import ChatModel, open_chat_model
from engine.inference.compiling import CannotCompile, CompilingStep
from engine.runs.registry import LoadedRun
from tests.support.decoding_models import TOKENIZER, build
from tests.support.paths import ROOT
from tests.support.small_runs import small_runs
from utils.errors import UserError

ONE_TOKEN = torch.zeros(1, 1, dtype=torch.long)
BUILDS = """
import json, os, sys, time
from pathlib import Path
job = json.loads(sys.stdin.readline())
with open(os.environ["BUILDS"], "a") as builds:
    builds.write(f"{job['form']} {job['niceness']}\\n")
time.sleep(float(os.environ.get("BUILD_SECONDS", 0)))
if os.environ.get("BUILD_KILLED"):
    os.kill(os.getpid(), 9)
if os.environ.get("BUILD_FAILS"):
    print("a long traceback", file=sys.stderr)
    sys.exit("the compiler has no idea")
folder = Path(job["folder"])
folder.mkdir()
folder.joinpath("step.so").write_text(os.environ.get("BUILT", "compiled"))
"""


class Step:
    """What CompilingStep needs of a PreparedStep; a "library" is a text, and the answer of the step."""

    precision = "fp32"

    def __init__(self):
        self.answer = "plain"

    def forms(self, slots):
        return [(1, 1)] if slots == 1 else [(2, 16), (1, 1)]

    def load(self, form, folder):
        text = folder.joinpath("step.so").read_text()
        if not text.startswith("compiled"):
            raise ValueError("not a library")
        self.answer = text

    def __call__(self, ids, state):
        return self.answer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of compiled steps, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("BUILDS", str(tmp_path / "builds"))
    monkeypatch.setenv("CXX", sys.executable)  # any program: none is run
    monkeypatch.setattr(compiling, "WORKER", [sys.executable, "-c", BUILDS])
    monkeypatch.setattr(compiling, "PAYS_AFTER", -1.0)
    return tmp_path / "mini_llm" / "steps"


def compiling_step(build="if used", slots=1, model_name="mini_any"):
    return CompilingStep(Step(), model_name, {"dim": 8}, slots, build)


def wait(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within ten seconds")


def builds(cache):
    path = cache.parent.parent / "builds"
    return path.read_text().splitlines() if path.exists() else []


def test_it_answers_at_once_and_changes_when_the_build_is_done(cache, monkeypatch):
    monkeypatch.setenv("BUILD_SECONDS", "0.2")
    step = compiling_step()
    step.start()
    assert step(ONE_TOKEN, None) == "plain"
    wait(lambda: not step.missing)
    assert step(ONE_TOKEN, None) == "compiled"
    step.close()
    assert builds(cache) == [f"[1, 1] {compiling.NICENESS}"]
    assert [path.suffix for path in sorted(cache.iterdir())] in (["", ".lock"], [""])


@pytest.mark.parametrize("build", ["never", "if used", "at once"])
def test_the_next_start_takes_it_from_disk(cache, build):
    compiling_step("at once").finish()
    step = compiling_step(build)
    step.start()
    wait(lambda: not step.missing)  # without having answered
    assert step(ONE_TOKEN, None) == "compiled" and len(builds(cache)) == 1
    other = compiling_step("never", model_name="mini_other")  # but not for another model
    other.start()
    other.close()
    assert other(ONE_TOKEN, None) == "plain"


@pytest.mark.parametrize("build, pays_after", [("never", -1.0), ("if used", 3600.0)])
def test_nothing_is_built_where_it_does_not_pay(cache, monkeypatch, build, pays_after):
    monkeypatch.setattr(compiling, "PAYS_AFTER", pays_after)
    step = compiling_step(build)
    step.start()
    for _ in range(100):
        assert step(ONE_TOKEN, None) == "plain"
    step.close()
    assert not builds(cache) and step.missing


def test_every_form_that_the_slots_need_is_built(cache):
    step = compiling_step("at once", slots=8)
    step.finish()
    assert [line.rpartition(" ")[0] for line in builds(cache)] == ["[2, 16]", "[1, 1]"] and not step.missing


def test_several_at_once_build_once(cache, monkeypatch):
    monkeypatch.setenv("BUILD_SECONDS", "0.3")
    steps = [compiling_step("at once") for _ in range(4)]
    threads = [threading.Thread(target=step.finish) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds(cache)) == 1 and all(step(ONE_TOKEN, None) == "compiled" for step in steps)


def test_a_failed_build_is_one_line_and_is_not_tried_again(cache, monkeypatch, capsys):
    monkeypatch.setenv("BUILD_FAILS", "1")
    for start in range(2):
        step = compiling_step()
        step.start()
        assert step(ONE_TOKEN, None) == "plain"
        step._thread.join(10)
        assert step(ONE_TOKEN, None) == "plain" and step.missing
        assert capsys.readouterr().err.count("\n") == (start == 0)
        step.close()
    assert len(builds(cache)) == 1
    with pytest.raises(CannotCompile, match="the compiler has no idea"):
        compiling_step("at once").finish()  # asked for, so tried again
    monkeypatch.delenv("BUILD_FAILS")
    compiling_step("at once").finish()
    assert not list(cache.glob("*.failed")) and not list(cache.glob("*.building"))


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_build_that_was_killed_is_tried_again_at_the_next_start(cache, monkeypatch, capsys):
    """The worker is the first to go when memory runs out, and the next time there may be enough."""
    monkeypatch.setenv("BUILD_KILLED", "1")
    step = compiling_step()
    step.start()
    assert step(ONE_TOKEN, None) == "plain"
    step._thread.join(10)
    assert "killed (signal 9)" in capsys.readouterr().err and not list(cache.glob("*.[fb]*"))
    monkeypatch.delenv("BUILD_KILLED")
    step = compiling_step()
    step.start()
    step(ONE_TOKEN, None)
    wait(lambda: not step.missing)
    assert step(ONE_TOKEN, None) == "compiled"
    step.close()


def test_a_damaged_library_is_built_again(cache, monkeypatch):
    compiling_step("at once").finish()
    for library in cache.glob("*/step.so"):
        library.write_text("half a lib")
    step = compiling_step()
    step.start()
    assert step(ONE_TOKEN, None) == "plain"
    wait(lambda: not step.missing)
    assert step(ONE_TOKEN, None) == "compiled" and len(builds(cache)) == 2
    monkeypatch.setenv("BUILT", "of another model")  # a build that does not fit is not tried for ever
    with pytest.raises(CannotCompile, match="not a library"):
        compiling_step("at once", model_name="mini_other").finish()


def test_closing_ends_the_build_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setenv("BUILD_SECONDS", "600")
    step = compiling_step()
    step.start()
    step(ONE_TOKEN, None)
    wait(lambda: builds(cache))
    assert list(cache.glob("*.building"))
    step.close()
    assert not step._thread.is_alive() and not list(cache.glob("*.building"))
    monkeypatch.setenv("BUILD_SECONDS", "0")
    compiling_step("at once").finish()  # the lock is free


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
def test_a_worker_ends_with_the_process_that_asked_for_it(tmp_path):
    """And takes its folder and its compiler along."""
    building = tmp_path / "x.building"
    building.mkdir()
    code = (
        "import subprocess, sys, threading\nfrom pathlib import Path\n"
        "from engine.inference.compile_worker import end_with_stdin\n"
        "compiler = subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL)\n"
        "threading.Thread(target=end_with_stdin, args=(Path(sys.argv[1]),), daemon=True).start()\n"
        "print(compiler.pid, flush=True)\ncompiler.wait()"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code, str(building)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    compiler = int(worker.stdout.readline())
    worker.stdin.close()
    assert worker.wait(30) == -signal.SIGKILL and not building.exists()

    def gone():
        try:
            os.kill(compiler, 0)
        except ProcessLookupError:
            return True
        status = open(f"/proc/{compiler}/stat").read() if os.path.exists("/proc") else ""
        return ") Z " in status

    wait(gone)
    worker.stdout.close()


def test_without_a_compiler_it_is_plain_in_silence(cache, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    step = compiling_step()
    step.start()
    assert step(ONE_TOKEN, None) == "plain"
    step.close()
    assert step(ONE_TOKEN, None) == "plain" and capsys.readouterr().err == ""
    with pytest.raises(UserError, match="no such program"):
        compiling_step("at once").finish()


def test_without_a_home_folder_it_is_plain_in_silence(cache, monkeypatch, capsys):
    """As for a user of a container who has neither HOME nor an entry in the list of users."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="name a folder by XDG_CACHE_HOME"):
        compiling_step("at once").finish()
    step = compiling_step()
    step.start()
    step._thread.join(10)
    assert step(ONE_TOKEN, None) == "plain" and capsys.readouterr().err == ""
    step.close()


def test_a_relative_cache_folder_is_that_of_this_process(cache, monkeypatch):
    """The worker runs in another folder."""
    monkeypatch.chdir(cache.parent.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", ".")
    step = compiling_step("at once")
    step.finish()
    assert step(ONE_TOKEN, None) == "compiled" and list(cache.glob("*/step.so"))


@pytest.mark.skipif(os.name != "posix", reason="needs the permissions of POSIX")
@pytest.mark.parametrize("place", ["mini_llm", "mini_llm/steps"])
def test_nothing_is_loaded_from_a_folder_that_others_may_write_to(cache, place, capsys):
    compiling_step("at once").finish()
    cache.parent.parent.joinpath(place).chmod(0o777)
    step = compiling_step("never")
    step.start()
    step.close()
    assert step(ONE_TOKEN, None) == "plain" and capsys.readouterr().err == ""
    with pytest.raises(UserError, match="chmod 700"):
        compiling_step("at once").finish()


def test_the_forms_used_last_are_kept(cache, monkeypatch):
    monkeypatch.setattr(compiling, "KEPT", 2)
    for name in ("mini_a", "mini_b", "mini_c"):
        compiling_step("at once", model_name=name).finish()
        time.sleep(0.02)
    assert sum(path.is_dir() for path in cache.iterdir()) == 2
    compiling_step("at once", model_name="mini_c").finish()
    assert len(builds(cache)) == 3


def test_a_chat_model_closes_its_step(cache, monkeypatch):
    closed = []
    monkeypatch.setattr(CompilingStep, "close", lambda self: closed.append(self))
    step = compiling_step()
    run = LoadedRun(build("recurrent"), TOKENIZER, {"stage": "sft"}, Path("run"), Path("run/final"), "")
    ChatModel(run, step).close()
    assert closed == [step]


@pytest.mark.slow
def test_a_run_becomes_fast_while_it_answers_and_stays_so(tmp_path, monkeypatch):
    """With the real worker: greedy answers before, across and after the change are equal, in the next process too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "PAYS_AFTER", -1.0)
    path = next(small_runs().glob("pretrain_*"))

    def answer(chat_model):
        return "".join(chat_model.generate([{"role": "user", "content": "春眠"}], 40, temperature=0))

    def step_of(chat_model):
        return chat_model.worker.scheduler.batch.decode_step

    with open_chat_model(path, "cpu") as chat_model:
        expected = answer(chat_model)
    with open_chat_model(path, "cpu", compile="auto") as chat_model:
        while step_of(chat_model).missing and step_of(chat_model)._thread.is_alive():
            assert answer(chat_model) == expected
        assert not step_of(chat_model).missing and answer(chat_model) == expected
    for compile in ("cached", "true"):
        with open_chat_model(path, "cpu", compile=compile) as chat_model:
            wait(lambda: not step_of(chat_model).missing)  # noqa: B023
            assert answer(chat_model) == expected
    shown = subprocess.run(
        [sys.executable, "test.py", "--run", path, "--temperature=0", "--max_new_tokens=40", "--prompt", "春眠"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (shown.stdout, shown.stderr) == ("春眠" + expected + "\n", "")
