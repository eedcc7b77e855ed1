"""Speed of each command alone and next to other programs: one busy process per core, which comes and goes in turns.

    python benchmarks/busy.py                          the terminal, the server with 1 and 8 requests, a training
    python benchmarks/busy.py --commands=terminal --model_name=mini_deepseekv3
    python benchmarks/busy.py --tree=../base           the commands of another checkout, with the same runs and tokens

The page decodes as the terminal does. The commands are those of a user, at the sizes of the model's CPU preset, with
random weights and random tokens. Server and training run on while other programs come and go. Goals next to one busy
process per core: decoding keeps 40% of its speed alone, training its share of the cores, which is a half. Before and
in each measurement the CPU time of all programs but these is taken from /proc: figures count on an idle machine only.
Writes benchmarks/results/busy.json and prints the medians over the rounds.
"""

import contextlib
import json
import os
import platform
import pty
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from preprocess_data.pipeline.train_bpe import save, train  # noqa: E402
from preprocess_data.pipeline.workers import available_cores  # noqa: E402
from utils.atomic import write_text  # noqa: E402
from utils.config import opt, parse  # noqa: E402
from utils.errors import UserError, run_script  # noqa: E402
from utils.tokenizer import N_SPECIAL, Tokenizer  # noqa: E402

COMMANDS = ("terminal", "server 1", "server 8", "training")
GOALS = {"terminal": 0.4, "server 1": 0.4, "server 8": 0.4, "training": 0.5}
IDLE = 0.05  # cores that other programs may use in a figure that counts
VOCAB = 5120  # the demo's
ANSWER = 200  # tokens
# without the compiled step: the process that builds it would be another program next to the commands
DECODING = ("--device=cpu", "--compile=false")
BUSY = "while True: pass"
PROC = Path("/proc")

Measure = Callable[[], float]  # tokens per second, now


@dataclass
class Config:
    __doc__ = __doc__
    model_name: str = opt("mini_llama3", "architecture; it needs a preset configs/<model>_cpu.yaml")
    commands: list[str] = opt(list(COMMANDS), "what is measured")
    rounds: int = opt(3, "measurements of each command, alone and next to busy processes in turns", ge=1)
    seconds: float = opt(12.0, "of one measurement of the training", gt=0)
    tree: str = opt(str(ROOT), "checkout whose commands are run")
    results: str = opt(str(ROOT / "benchmarks/results/busy.json"), "file of the figures")

    def __post_init__(self) -> None:
        for name in self.commands:
            if name not in COMMANDS:
                raise UserError(f"--commands={name}: choose from {', '.join(COMMANDS)}")


# ---------------------------------------------------------------- the CPU time of other programs


class OtherPrograms:
    """The cores that programs use that are neither this process nor its children, since it was made.

    children: those that run; finished ones are counted by the system.
    """

    def __init__(self, children: list[subprocess.Popen]):
        self.children = children
        self.start = self._now()

    def cores(self) -> float | None:
        """Return their mean number; None where the system has no /proc."""
        if not PROC.is_dir():
            return None
        (at, used), (before, used_before) = self._now(), self.start
        return round(max(0.0, used - used_before) / (at - before), 3)

    def _now(self) -> tuple[float, float]:
        """Return the time, and the CPU seconds of all others since the system's start."""
        if not PROC.is_dir():
            return time.monotonic(), 0.0
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, soft_irq, *_ = map(int, (PROC / "stat").read_text().split()[1:11])
        own = 0.0
        for child in self.children:
            if child.poll() is None:
                own += sum(map(int, (PROC / f"{child.pid}/stat").read_text().rpartition(")")[2].split()[11:15])) / tick
        own += sum(os.times()[:4])  # with the children that have ended
        return time.monotonic(), (user + nice + system + irq + soft_irq) / tick - own


@contextlib.contextmanager
def busy_processes(count: int, children: list[subprocess.Popen]) -> Iterator[None]:
    """Keep `count` cores busy in the block."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    children += started
    try:
        time.sleep(0.5 if count else 0.0)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()
            children.remove(process)


# ---------------------------------------------------------------- what the commands need


def make_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer with about as many tokens as the demo's, of random Chinese characters."""
    letters = [chr(0x4E00 + i) for i in range(VOCAB)]
    dice = random.Random(0)
    return save(train(("".join(dice.choices(letters, k=500)) for _ in range(200)), VOCAB, split_han=True), folder)


def make_tokens(path: Path, tokenizer: Tokenizer) -> None:
    """Random documents, more than a training reads here."""
    documents = np.random.default_rng(0).integers(N_SPECIAL, tokenizer.vocab_size, (20_000, 200), dtype=np.uint16)
    documents[:, 0] = tokenizer.bos_id
    documents[:, -1] = tokenizer.eos_id
    path.write_bytes(documents.tobytes())


class Commands:
    """The commands of a user in the checkout `tree`, on the files in `folder`."""

    def __init__(self, config: Config, folder: Path):
        self.config = config
        self.folder = folder
        self.children: list[subprocess.Popen] = []
        tokenizer = make_tokenizer(folder / "tokenizer")
        make_tokens(folder / "pretrain_train.bin", tokenizer)
        with self.start(*self.pretrain("run", "--max_steps=1")) as made:
            made.communicate()
        self.run = folder / "run"
        if made.returncode or not (self.run / "final").is_dir():
            raise UserError(f"the training of one step failed: run {shlex.join(made.args)}")  # type: ignore[arg-type]

    def pretrain(self, name: str, *flags: str) -> list[str]:
        return [
            "pretrain.py",
            f"--config=configs/{self.config.model_name}_cpu.yaml",
            f"--tokenizer_path={self.folder / 'tokenizer'}",
            f"--pretrain_data_path={self.folder / 'pretrain_train.bin'}",
            f"--output_path={self.folder}",
            f"--run_name={name}",
            "--device=cpu",
            "--skip_checks",
            "--eval_interval=0",
            "--sample_interval=0",
            "--save_interval=0",
            *flags,
        ]

    @contextlib.contextmanager
    def start(self, *words: str, **pipes: Any) -> Iterator[subprocess.Popen]:
        """Run a script of the checkout in the block, and end it as Ctrl-C does."""
        quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        environment = os.environ | {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, *words], cwd=self.config.tree, env=environment, text=True, **quiet | pipes
        )
        self.children.append(process)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(60)
            self.children.remove(process)

    @contextlib.contextmanager
    def terminal(self) -> Iterator[Measure]:
        """test.py --prompt, once per measurement; the speed is the one that it prints to a terminal."""

        def measure() -> float:
            ours, theirs = pty.openpty()
            answer = [f"--run={self.run}", "--prompt=一", f"--max_new_tokens={ANSWER}", *DECODING]
            with self.start("test.py", *answer, stderr=theirs) as process:
                os.close(theirs)
                text = b""
                with contextlib.suppress(OSError):  # the end of a terminal
                    while piece := os.read(ours, 4096):
                        text += piece
                process.wait()
            os.close(ours)
            found = re.search(r"([\d.]+) tokens/s", text.decode(errors="replace"))
            if found is None:
                raise UserError(f"test.py printed no speed: {text.decode(errors='replace').strip()}")
            return float(found[1])

        yield measure

    @contextlib.contextmanager
    def server(self, requests: int) -> Iterator[Measure]:
        """serve.py, asked for so many answers at once; tokens of all of them per second."""
        with self.start("serve.py", f"--run={self.run}", "--port=0", *DECODING, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            found = re.search(r"http://\S+/v1", process.stdout.readline())
            if found is None:
                raise UserError(f"serve.py did not start: python serve.py --run={self.run} shows why")
            body = {"model": self.run.name, "prompt": "一", "max_tokens": ANSWER}

            def ask(counts: list[int]) -> None:
                request = urllib.request.Request(
                    f"{found[0]}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=300) as response:
                    counts.append(json.load(response)["usage"]["completion_tokens"])

            def measure() -> float:
                counts: list[int] = []
                threads = [threading.Thread(target=ask, args=(counts,)) for _ in range(requests)]
                started = time.perf_counter()
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                return sum(counts) / (time.perf_counter() - started)

            measure()  # the first request starts the worker's threads
            yield measure

    @contextlib.contextmanager
    def training(self) -> Iterator[Measure]:
        """pretrain.py, by the tokens that it logs."""
        metrics = self.folder / "training/metrics.jsonl"

        def records() -> list[dict[str, Any]]:
            """The steps that are logged so far; the last line may not be complete."""
            lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
            return [json.loads(line) for line in lines]

        with self.start(*self.pretrain("training", "--log_interval=2", "--resume=never")) as process:

            def next_record() -> tuple[float, int]:
                """Wait for the next record; returns the time, and the tokens until then."""
                seen = len(records())
                while process.poll() is None:
                    if len(found := records()) > seen:
                        return time.perf_counter(), found[-1]["tokens"]
                    time.sleep(0.01)
                raise UserError(f"pretrain.py ended by itself: run {shlex.join(process.args)}")  # type: ignore[arg-type]

            def measure() -> float:
                start, tokens_at_start = end, tokens = next_record()
                while end - start < self.config.seconds:
                    end, tokens = next_record()
                return (tokens - tokens_at_start) / (end - start)

            for _ in range(3):
                next_record()  # the first steps allocate memory
            yield measure

    def open(self, name: str) -> contextlib.AbstractContextManager[Measure]:
        """Return one of COMMANDS as a context in which it can be measured."""
        kind, _, requests = name.partition(" ")
        return self.server(int(requests)) if kind == "server" else getattr(self, kind)()


# ---------------------------------------------------------------- rounds and results


def measure_in_turns(commands: Commands, name: str, cores: int, rounds: int) -> dict[str, list]:
    """Return {"alone", "busy": tokens per second of each round, "others": cores that other programs used in each}."""
    found: dict[str, list] = {"alone": [], "busy": [], "others": []}
    with commands.open(name) as measure:
        for _ in range(rounds):
            for kind, count in (("alone", 0), ("busy", cores)):
                with busy_processes(count, commands.children):
                    others = OtherPrograms(commands.children)
                    found[kind].append(round(measure(), 1))
                    found["others"].append(others.cores())
    return found


def row(name: str, found: dict[str, list]) -> dict[str, Any]:
    """The medians of a command, the share of its speed that is left, and whether it reaches its goal."""
    alone, busy = statistics.median(found["alone"]), statistics.median(found["busy"])
    kept = round(busy / alone, 3)
    return {
        "alone": alone,
        "busy": busy,
        "kept": kept,
        "goal": GOALS[name],
        "reached": kept >= GOALS[name],
        "rounds": found,
    }


def others_before(seconds: float = 2.0) -> float | None:
    """Cores that all other programs use now."""
    others = OtherPrograms([])
    time.sleep(seconds)
    return others.cores()


def main() -> None:
    config = parse(Config)
    cores = available_cores()
    before = others_before()
    if before is None:
        print("the CPU time of other programs is unknown on this system: make sure that none runs", flush=True)
    elif before > IDLE:
        print(f"warning: other programs use {before:.2f} cores: these are no figures of an idle machine", flush=True)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="busy_") as folder:
        commands = Commands(config, Path(folder))
        for name in config.commands:
            rows[name] = row(name, measure_in_turns(commands, name, cores, config.rounds))
            print(json.dumps({name: rows[name]}), flush=True)
    about = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {cores} cores",
        "torch": version("torch"),
        "model": config.model_name,
        "other_programs_before": before,
    }
    write_text(Path(config.results), json.dumps({**about, "commands": rows}, indent=1) + "\n")
    print(
        f"\n| {config.model_name}, tokens per second | alone | {cores} busy processes | kept | goal | other programs |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, figures in rows.items():
        seen = [used for used in figures["rounds"]["others"] if used is not None]
        cells = [
            name,
            f"{figures['alone']:.0f}",
            f"{figures['busy']:.0f}",
            f"{figures['kept']:.0%}",
            f"{figures['goal']:.0%} {'reached' if figures['reached'] else 'missed'}",
            f"at most {max(seen):.2f} cores" if seen else "unknown",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    run_script(main)
