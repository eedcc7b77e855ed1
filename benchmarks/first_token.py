"""Time from a cold start of `python test.py --prompt ...` to its first output, and the part that importing torch takes.

    python benchmarks/first_token.py --run output/sft_MODEL

The processes take turns, so that a slow minute affects all: Python alone, Python that imports torch, test.py until its
first byte on a pipe, and a chat until it decodes by the compiled step that an earlier process left on disk (built first
where it is not). Writes benchmarks/results/first_token.json, and prints the medians.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.config import opt, parse  # noqa: E402
from utils.errors import run_script  # noqa: E402

COMPILED = """
import sys, time
from engine.inference.chat import choose_run, make_decode_step
from engine.runs.registry import load_run
run = load_run(sys.argv[1] or choose_run("output"))
step = make_decode_step(run, "fp32", sys.argv[2], slots=1)
while getattr(step, "missing", ()):
    time.sleep(0.01)
print(type(step).__name__)
"""
VERSIONS = ("torch", "tokenizers", "safetensors")


@dataclass
class Config:
    __doc__ = __doc__
    run: str = opt("", "run folder (empty: the newest in output)", path=True)
    repeats: int = opt(5, "measurements of each process")
    prompt: str = opt("春眠不觉晓，", "prompt of the answer")
    results: str = opt(str(ROOT / "benchmarks/results/first_token.json"), "file of the results")


def main() -> None:
    config = parse(Config)
    answer = ["test.py", f"--prompt={config.prompt}", "--device=cpu", *([f"--run={config.run}"] if config.run else [])]
    words = {"python": ["-c", "print(1)"], "torch": ["-c", "import torch; print(1)"], "first_token": answer}
    build = [sys.executable, "-c", COMPILED, config.run, "true"]
    if subprocess.run(build, cwd=ROOT, capture_output=True, text=True).stdout.strip() == "CompilingStep":
        words["compiled"] = ["-c", COMPILED, config.run, "cached"]
    seconds: dict[str, list[float]] = {name: [] for name in words}
    for _ in range(config.repeats):
        for name, arguments in words.items():
            seconds[name].append(first_byte(arguments))
    medians = {name: round(statistics.median(times), 3) for name, times in seconds.items()}
    medians["rest"] = round(medians["first_token"] - medians["torch"], 3)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }
    out = {
        **about,
        "median_seconds": medians,
        "seconds": {name: [round(s, 3) for s in times] for name, times in seconds.items()},
    }
    Path(config.results).parent.mkdir(parents=True, exist_ok=True)
    Path(config.results).write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    print(
        f"first token after {medians['first_token']:.2f} s: {medians['torch']:.2f} s to import torch, "
        f"{medians['rest']:.2f} s for the rest (medians of {config.repeats}); "
        + (f"compiled after {medians['compiled']:.2f} s" if "compiled" in medians else "the step cannot be compiled")
    )


def first_byte(arguments: list[str]) -> float:
    """Return the seconds from the start of the process to the first byte of its standard output."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        passed = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise SystemExit(process.returncode)
    return passed


def machine() -> str:
    """Return the CPU's name and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    run_script(main)
