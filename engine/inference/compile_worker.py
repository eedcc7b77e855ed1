"""The process that compiles a decode step for others: `python -m engine.inference.compile_worker`, a job on stdin.

It gives way to everything else, and ends when stdin does: then the process that asked for it is gone.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> None:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_stdin, args=(Path(job["folder"]).parent,), daemon=True).start()
    give_way(job["niceness"])
    build(job)


def build(job: dict[str, Any]) -> None:
    """Compile one form of the decode step of a model, whose weights may be any, into the folder `job["folder"]`."""
    from engine.inference.chat import DTYPES
    from model import get_model_and_args
    from model.kernels.prepare import prepare_for_decoding

    Model, ModelArgs = get_model_and_args(job["model_name"])
    model = Model(ModelArgs(**job["fields"])).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[job["precision"]])
    prepare_for_decoding(model, job["precision"]).build(tuple(job["form"]), Path(job["folder"]))


def give_way(niceness: int) -> None:
    """Leave cores to others, and be the first to go when memory runs out."""
    if niceness and os.name == "posix":
        os.nice(niceness)
        # Linux may share the cores between sessions first, and this process leads one: then its niceness counts as well
        for file, value in ("autogroup", niceness), ("oom_score_adj", 1000):
            with contextlib.suppress(OSError):
                Path("/proc/self", file).write_text(str(value))


def end_with_stdin(folder: Path) -> None:
    sys.stdin.read()
    shutil.rmtree(folder, ignore_errors=True)
    if os.name == "posix":
        os.killpg(0, signal.SIGKILL)  # the compiler too: the worker leads a session of its own
    os._exit(1)


if __name__ == "__main__":
    main()
