"""A decode step that is plain at first, and compiled once it is loaded from disk or built by another process.

Compiled forms are kept in a folder that only the user may write to, since they are executed, under a digest of all that
they depend on. Answers do not wait: the step changes between two tokens.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from model.basemodel import State
from model.kernels.prepare import PreparedStep, folder_of
from utils.errors import UserError
from utils.files import PROJECT
from utils.log import warn

PAYS_AFTER = 1.0  # seconds of plain decoding in this process, before others' cores are used for a build
KEPT = 50  # compiled forms on disk; those used last stay
NICENESS = 19
WORKER = [sys.executable, "-m", "engine.inference.compile_worker"]
Form = tuple[int, int]  # least and most sequences


class CannotCompile(UserError):
    """The decode step cannot be compiled ahead of time; the message says why."""


class CompilingStep:
    """`decode_step(ids, state)` that brings in its compiled forms.

    build: "at once", "if used", once plain decoding has taken a second, or "never", then only forms on disk are used.
    `start` it, or call `finish`, which waits for all forms. `close` ends what it began.
    """

    def __init__(self, step: PreparedStep, model_name: str, fields: dict[str, Any], slots: int, build: str) -> None:
        """fields: the arguments that the model was made of, as `config.yaml` has them."""
        self.step = step
        self.build = build
        self.missing: list[Form] = step.forms(slots)
        self._job = {"model_name": model_name, "fields": fields, "precision": step.precision}
        self._seconds = 0.0  # of plain decoding
        self._problem = ""
        self._used = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, ids: torch.Tensor, state: State) -> torch.Tensor:
        if not self.missing or self.build != "if used" or ids.shape[1] > 1:
            return self.step(ids, state)
        start = time.perf_counter()
        logits = self.step(ids, state)
        self._seconds += time.perf_counter() - start
        if self._seconds > PAYS_AFTER:
            self._used.set()
        return logits

    def start(self) -> None:
        """Bring the forms in, in a thread. A failure is a line on stderr, once; then the step stays plain."""
        self._thread = threading.Thread(target=self._bring_in, name="compiling-step", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until all forms are compiled. UserError without a compiler, CannotCompile for a model that cannot be."""
        for form in list(self.missing):
            if not self._load(form):
                self._build(form)

    def close(self) -> None:
        """End the build that is under way; what is on disk stays."""
        self._closing.set()
        self._used.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _bring_in(self) -> None:
        try:
            for form in list(self.missing):
                self._load(form)
            if self.missing and self.build == "if used":
                self._used.wait()
                for form in list(self.missing):
                    self._build(form)
        except CannotCompile as problem:
            warn(f"decoding is not compiled, and slower than it could be: {problem}")
        except (UserError, OSError):  # no compiler, or no folder; --compile reports it
            pass

    def _place(self, form: Form) -> Path:
        return folder_of(form, json.dumps(self._job, sort_keys=True))

    def _load(self, form: Form) -> bool:
        """Use a form that is on disk; returns whether it is, and fits."""
        place = self._place(form)
        if not place.is_dir() or self._closing.is_set():
            return False
        try:
            self.step.load(form, place)
        except Exception as error:  # damaged, or it does not compute what the model does
            shutil.rmtree(place, ignore_errors=True)
            self._problem = _one_line(error)
            return False
        os.utime(place)
        self.missing.remove(form)
        return True

    def _build(self, form: Form) -> None:
        """Build a form in another process and load it, unless it is built already; one process at a time does."""
        from filelock import FileLock, Timeout  # only here: it takes a while to import

        place = self._place(form)
        failed = place.with_suffix(".failed")  # with the reason; only --compile tries again
        lock = FileLock(place.with_suffix(".lock"))
        while not self._closing.is_set():
            try:
                with lock.acquire(timeout=0.5):
                    if self._load(form) or failed.exists() and self.build == "if used":
                        return
                    self._problem = self._run_worker(form, place)
                    if not self._problem and self._load(form) or self._closing.is_set():
                        failed.unlink(missing_ok=True)
                        prune(place.parent)
                        return
                    failed.write_text(self._problem + "\n", encoding="utf-8")
                    raise CannotCompile(self._problem)
            except Timeout:
                continue

    def _run_worker(self, form: Form, place: Path) -> str:
        """Build the folder `place` in a process of its own; returns the last line of its errors, "" for none."""
        building = place.with_suffix(".building")
        shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
        building.mkdir(mode=0o700)
        job = {**self._job, "form": form, "folder": str(building / "step")}
        job["niceness"] = NICENESS if self.build == "if used" else 0
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(building / "inductor"), **os.environ, "OMP_NUM_THREADS": "1"}
        try:
            with (
                open(building / "log", "w+", encoding="utf-8", errors="replace") as log,
                subprocess.Popen(
                    WORKER,
                    cwd=PROJECT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for this process, and the compiler ends with the worker
                ) as worker,
            ):
                self._wait(worker, job)
                log.seek(0)
                errors = log.read().strip().splitlines() or [f"exit status {worker.returncode}"]
            if worker.returncode < 0 and not self._closing.is_set():  # says nothing about the model: not kept
                raise CannotCompile(f"the compiler was killed (signal {-worker.returncode}), as when memory runs out")
            if worker.returncode:
                return errors[-1]
            os.replace(building / "step", place)
            return ""
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def _wait(self, worker: subprocess.Popen, job: dict[str, Any]) -> None:
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(job).encode() + b"\n")
        worker.stdin.flush()  # and stays open: its end means that this process is gone
        while worker.poll() is None:
            if self._closing.wait(0.1):
                kill(worker)
                worker.wait()


def kill(worker: subprocess.Popen) -> None:
    """End a worker, and the compiler that it runs."""
    if os.name == "posix":
        os.killpg(worker.pid, signal.SIGKILL)
    else:
        worker.kill()


def prune(steps: Path) -> None:
    """Remove all but the forms used last."""
    forms = sorted(
        (path for path in steps.iterdir() if path.is_dir() and not path.suffix), key=lambda p: p.stat().st_mtime
    )
    for path in forms[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
