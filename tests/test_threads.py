"""The number of threads of a decode step, on machines whose step times are given; and threads that sleep when idle."""

import os
import random
import re
import subprocess
import sys
import threading
import types

import pytest
import torch

from engine.inference import threads, worker
from engine.inference.generate import generate, stream
from engine.inference.scheduler import Scheduler
from engine.inference.threads import AVAILABLE, OF_THE_USER, TIMED, WORK, Choice, StepThreads, kept_threads
from engine.inference.worker import BatchWorker
from tests.support.decoding_models import PROMPTS, TOKENIZER, build
from tests.support.paths import ROOT

# Seconds of a step with n threads.
SMALL = {1: 5.0e-3, 2: 4.85e-3}  # as measured: a second thread gains nothing
SMALL_BUSY = {1: 8.5e-3, 2: 100e-3}  # next to other programs two threads wait for each other
LARGE = {1: 40e-3, 2: 22e-3}
LARGE_BUSY = {1: 80e-3, 2: 150e-3}
BANDWIDTH = {n: 50e-3 / min(n, 6) + 0.5e-3 * n for n in range(1, 17)}  # memory is the limit from 6 threads on
PERFECT = {n: 50e-3 / n for n in range(1, 17)}


def run(choice, machine, steps, noise=0.05, dice=None):
    """Take steps on a machine; returns how many were taken with each number of threads, and the seconds of each."""
    dice = dice or random.Random(0)
    counts, seconds = {}, {}
    for _ in range(steps):
        n = choice.threads
        took = machine[n] * (1 + noise * dice.random())
        choice.record(took)
        counts[n] = counts.get(n, 0) + 1
        seconds[n] = seconds.get(n, 0) + took
    return counts, seconds


@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize(
    "machine, best",
    [(SMALL, 1), (SMALL_BUSY, 1), (LARGE, 2), (LARGE_BUSY, 1)],
    ids="small small_busy large large_busy".split(),
)
def test_the_number_that_pays_is_found_in_a_few_steps(machine, best, start):
    choice = Choice(start, 2)
    run(choice, machine, 30)
    counts, seconds = run(choice, machine, 2000)
    assert max(counts, key=counts.get) == best
    other = sum(s for n, s in seconds.items() if n != best)
    assert other < 0.06 * sum(seconds.values())  # of the trials


def test_it_follows_a_machine_that_becomes_busy_and_free_again():
    for free, busy, alone in ((LARGE, LARGE_BUSY, 2), (SMALL, SMALL_BUSY, 1)):
        choice, dice = Choice(1, 2), random.Random(1)
        run(choice, free, 300, dice=dice)
        for _ in range(3):
            run(choice, busy, 200, dice=dice)
            counts, _ = run(choice, busy, 200, dice=dice)
            assert counts[1] > 190
            run(choice, free, 400, dice=dice)
            counts, _ = run(choice, free, 200, dice=dice)
            assert counts[alone] > 180


@pytest.mark.parametrize("limit", [4, 6, 16])
@pytest.mark.parametrize("start", [1, "limit"])
@pytest.mark.parametrize("machine", [BANDWIDTH, PERFECT], ids=["bandwidth", "perfect"])
def test_many_cores(machine, limit, start):
    """It ends at a number that takes at most a quarter longer than the best one, and never leaves 1 to `limit`."""
    choice = Choice(limit if start == "limit" else start, limit)
    run(choice, machine, 400)
    counts, _ = run(choice, machine, 1000)
    chosen = max(counts, key=counts.get)
    assert machine[chosen] <= 1.25 * min(machine[n] for n in range(1, limit + 1))
    assert set(counts) <= set(range(1, limit + 1))


def test_one_slow_step_decides_nothing():
    choice = Choice(1, 2)
    run(choice, LARGE, 100)
    for _ in range(20):  # every tenth step meets a pause
        run(choice, {n: 10 * s for n, s in LARGE.items()}, 1)
        counts, _ = run(choice, LARGE, 9)
    counts, _ = run(choice, LARGE, 300)
    assert counts[2] > 250


def test_a_trial_that_is_far_slower_ends_at_its_first_step():
    choice = Choice(1, 2)
    counts, _ = run(choice, SMALL_BUSY, 200)
    assert counts.get(2, 0) <= 2


# ---------------------------------------------------------------- around the forward passes of a model


def choose_here(monkeypatch):
    """A user who has set no number of threads; the test suite sets one."""
    for name in OF_THE_USER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(monkeypatch):
    """A machine with 4 cores whose numbers of threads are recorded; the user has set none."""
    choose_here(monkeypatch)
    number = [4]
    fake = types.SimpleNamespace(get_num_threads=lambda: number[-1], set_num_threads=lambda n: number.append(n))
    monkeypatch.setattr(threads, "torch", fake)
    return types.SimpleNamespace(number=number)


def model_of(active, device="cpu"):
    parameter = torch.empty(1, device=device)
    return types.SimpleNamespace(num_params=lambda: {"active": active}, parameters=lambda: iter([parameter]))


@pytest.mark.parametrize(
    "active, n_tokens, expected",
    [
        (WORK // 8, 1, 1),  # a decode step of a small model
        (WORK, 1, 1),
        (3 * WORK, 1, 3),
        (100 * WORK, 1, 4),
        (WORK // 8, 17, 2),
        (WORK // 8, TIMED + 1, 4),  # a prompt
        (WORK // 2**10, TIMED + 1, 1),
    ],
)
def test_the_first_pass_takes_threads_by_its_size(machine, active, n_tokens, expected):
    with StepThreads(model_of(active)).running(n_tokens):
        assert machine.number[-1] == expected


def test_steps_are_timed_by_their_number_of_tokens_and_prompts_are_not(machine, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])
    counts = StepThreads(model_of(WORK // 8))

    def step(n_tokens, machine_of):
        with counts.running(n_tokens):
            used = machine.number[-1]
            clock[0] += machine_of[used]
        return used

    slow_alone = {1: 4.0, 2: 2.0, 3: 1.5, 4: 1.0}
    gains_nothing = {n: 1.0 for n in range(1, 5)}
    for _ in range(60):
        step(1, gains_nothing)
        step(6, slow_alone)
        assert step(TIMED + 1, slow_alone) == 4
    assert [step(1, gains_nothing) for _ in range(20)].count(1) > 14
    assert [step(6, slow_alone) for _ in range(20)].count(4) > 14


@pytest.mark.parametrize("reason", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "cuda", "one core"])
def test_the_number_stays_where_it_is_not_ours_to_choose(machine, monkeypatch, reason):
    if reason in OF_THE_USER:
        monkeypatch.setenv(reason, "4")
    counts = StepThreads(
        model_of(WORK // 8, "meta" if reason == "cuda" else "cpu"), 1 if reason == "one core" else None
    )
    for n_tokens in (1, 5, 1000):
        with counts.running(n_tokens):
            pass
    assert machine.number == [4]


@pytest.fixture
def restless(monkeypatch):
    """Every pass of inference sets 3 threads, in whatever thread it runs."""
    choose_here(monkeypatch)
    before = torch.get_num_threads()
    seen = []

    class Three(StepThreads):
        def __init__(self, model, limit=None):
            super().__init__(model, 4 if limit is None else limit)
            self._choices = dict.fromkeys(range(64), types.SimpleNamespace(threads=3, record=lambda seconds: None))

        def running(self, n_tokens):
            seen.append((threading.get_ident(), n_tokens))
            return super().running(n_tokens)

    monkeypatch.setattr("engine.inference.batch.StepThreads", Three)
    yield seen
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["recurrent", "no state"])
def test_generating_leaves_the_callers_number_of_threads_and_the_answer(restless, monkeypatch, name):
    model = build(name)
    torch.set_num_threads(2)
    answers = generate(model, TOKENIZER, PROMPTS, 6, stop_ids=(), temperature=0)
    assert torch.get_num_threads() == 2 and restless
    for _ in stream(model, TOKENIZER, PROMPTS[0], 6, stop_ids=(), temperature=0):
        assert torch.get_num_threads() == 2  # between two steps as well
    with monkeypatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        assert generate(model, TOKENIZER, PROMPTS, 6, stop_ids=(), temperature=0) == answers


def test_speculation_and_a_model_without_state_count_their_tokens(restless):
    generate(build("no state"), TOKENIZER, [[1, 2, 3]], 3, stop_ids=(), temperature=0)
    assert [n for _, n in restless] == [3, 4, 5]  # it reads everything again
    restless.clear()
    generate(build("recurrent"), TOKENIZER, [[1, 2, 3], [4, 5, 6]], 3, stop_ids=(), temperature=0)
    assert [n for _, n in restless] == [6, 2, 2]
    restless.clear()
    generate(build("recurrent"), TOKENIZER, [[1, 2, 3]], 9, stop_ids=(), temperature=0, speculative="ngram")
    assert restless[0][1] == 3 and len(restless) <= 9


def test_a_worker_may_use_all_threads_of_the_process(monkeypatch):
    """The thread that opens a model may be a new one, which has the number that some worker has set."""
    monkeypatch.setattr(worker, "AVAILABLE", 7)
    scheduler = Scheduler(build("recurrent"), 1)
    with BatchWorker(scheduler):
        assert scheduler.batch.threads.limit == 7


def test_kept_threads_restores_the_number_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), kept_threads():
        torch.set_num_threads(before + 1)
        raise KeyError
    assert torch.get_num_threads() == before
    assert AVAILABLE >= 1


# ---------------------------------------------------------------- idle threads sleep


OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
SCRIPTS = ["pretrain.py", "sft.py", "test.py", "serve.py", "run_model.py", "demo/evaluate.py"]


@pytest.mark.parametrize("name", ["", *OPENMP])
def test_idle_threads_sleep_unless_the_user_sets_how_they_wait(name):
    code = f"import os, utils.openmp; print({{k: os.environ[k] for k in {OPENMP} if k in os.environ}})"
    plain = {key: value for key, value in os.environ.items() if key not in OPENMP}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=plain | ({name: "ACTIVE"} if name else {}), capture_output=True, text=True, check=True,
    )  # fmt: skip
    waiting = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
    assert done.stdout.strip() == str({name: "ACTIVE"} if name else waiting)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_that_computes_sets_it_before_pytorch_is_loaded(script):
    """By the order of the imports: it is the first of ours, and nothing before it can load PyTorch."""
    lines = [
        line for line in (ROOT / script).read_text(encoding="utf-8").splitlines() if re.match(r"(import|from) ", line)
    ]
    place = next(i for i, line in enumerate(lines) if line.startswith("import utils.openmp"))
    before = {re.split(r"[ .]", line)[1] for line in lines[:place]}
    assert before <= {*sys.stdlib_module_names, "streamlit"}


def test_openmp_reads_it_when_pytorch_is_loaded():
    """What libgomp prints about itself as it loads."""
    plain = {key: value for key, value in os.environ.items() if key not in OPENMP}
    done = subprocess.run(
        [sys.executable, "pretrain.py", "--help"],
        cwd=ROOT,
        env=plain | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    policies, spins = (set(re.findall(rf"{name}\s*=\s*'(\w+)'", done.stderr)) for name in OPENMP[:2])
    if not policies:
        pytest.skip("this OpenMP does not print its settings")
    assert policies == {"PASSIVE"} and spins <= {"3000"}  # only libgomp knows the second
