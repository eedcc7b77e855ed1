"""run_demo.sh and its helpers, with placeholders for the stages: which stages are skipped, repeated, and stop it."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from demo import budget

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# A stage that logs its call and writes the files of the real one.
PLACEHOLDER = """
import json, os, sys
from pathlib import Path
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--") and "=" in a)
name = Path(sys.argv[0]).stem
with open("calls.txt", "a") as log:
    print(name, *sys.argv[1:], file=log)
def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
if name == "preprocess_data" and sys.argv[1] == "fetch":
    write(f"output/corpora/{sys.argv[2]}.jsonl", "{}")
elif name == "preprocess_data":
    stage = sys.argv[1]
    write(f"{flags['data_path']}/{stage}_train.meta.json", "{}")
elif name == "train_tokenizer":
    write(f"{flags['tokenizer_path']}/tokenizer.json", str(flags))
elif name in ("pretrain", "sft"):
    model = flags.get("model_name") or Path(flags["init_from"]).name.split("_", 1)[1]
    folder, number = Path(flags["output_path"]) / f"{name}_{model}", 1
    while (folder / "summary.json").exists():
        number += 1
        folder = folder.with_name(f"{name}_{model}_{number}")
    status = "stopped by SIGINT" if os.environ.get("STOP") == name else "finished"
    if status == "finished":
        write(folder / "summary.json", json.dumps({"status": status, "flags": flags}, indent=1))
    write(flags["write_run_path"], str(folder))
elif name == "evaluate":
    write(f"{flags['run']}/demo.json", "{}")
"""


@pytest.fixture
def project(tmp_path):
    """A tree in which run_demo.sh runs without training anything: its folder has a blank in its name."""
    root = tmp_path / "a project"
    for folder in ("demo", "scripts", "configs", "model", ".venv/bin", "preprocess_data"):
        (root / folder).mkdir(parents=True)
    for name in ("run_demo.sh", "scripts/venv.sh", "demo/times.py", "demo/budget.py"):
        shutil.copy(ROOT / name, root / name)
    for name in ("pretrain", "sft", "train_tokenizer", "preprocess_data/preprocess_data", "demo/evaluate"):
        (root / f"{name}.py").write_text(PLACEHOLDER, encoding="utf-8")
    (root / "demo/preset.py").write_text("import sys; print(f'configs/{sys.argv[1]}_cpu.yaml')\n", encoding="utf-8")
    (root / "demo/report.py").write_text("print('the report')\n", encoding="utf-8")
    (root / "model/__init__.py").write_text("def model_file(name): return f'model/{name}.py'\n", encoding="utf-8")
    for name in ("one", "mini_deepseekv3"):
        (root / f"model/{name}.py").write_text(f'    model_name = "{name}"\n', encoding="utf-8")
        (root / f"configs/{name}_cpu.yaml").write_text("max_lr: 1\n", encoding="utf-8")
    (root / "configs/sft_cpu.yaml").write_text("max_lr: 1\n", encoding="utf-8")
    for name in ("requirements.txt", "pyproject.toml", ".venv/installed-demo"):  # nothing to install
        (root / name).write_text("", encoding="utf-8")
    python = root / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return root


def demo(project, *arguments, cwd=None, **environment):
    """Run the demo; return the finished process and the names of the stages that were called."""
    calls = project / "calls.txt"
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", str(project / "run_demo.sh"), *arguments],
        cwd=cwd or project, env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    called = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
    return done, [" ".join(w for w in line.split()[:3] if not w.startswith("--")) for line in called]


ALL = [
    "preprocess_data fetch poems", "preprocess_data fetch idioms", "preprocess_data fetch demo-chat", "train_tokenizer",
    "preprocess_data pretrain", "preprocess_data sft", "pretrain", "sft", "evaluate",
]  # fmt: skip


def minutes_of(project):
    """The --max_minutes of every training stage that was called."""
    calls = [line.split() for line in (project / "calls.txt").read_text(encoding="utf-8").splitlines()]
    given = {
        call[0]: [float(word.split("=")[1]) for word in call if word.startswith("--max_minutes=")] for call in calls
    }
    assert not any(found for stage, found in given.items() if stage not in ("pretrain", "sft"))
    return {stage: found[0] for stage, found in given.items() if found}


def test_every_stage_runs_once_and_a_second_run_does_nothing(project, tmp_path):
    done, called = demo(project, cwd=tmp_path)  # from any folder
    assert done.returncode == 0, done.stderr
    assert called == ALL
    given = minutes_of(project)  # what is left of 20
    assert 13 < given["pretrain"] < 15 and 3 < given["sft"] < 5.5
    assert (project / "output/sft_mini_deepseekv3/demo.json").exists()
    done, called = demo(project)
    assert done.returncode == 0 and called == [], done.stdout
    assert "the report" in done.stdout and done.stdout.count("done before") == len(ALL)


def test_a_second_model_shares_corpora_tokenizer_and_tokens(project):
    demo(project)
    given = sum(minutes_of(project).values())
    times = project / "output/demo_times.json"
    slow = {**json.loads(times.read_text(encoding="utf-8")), "tokenizer": 100, "tokens": 60}
    times.write_text(json.dumps(slow), encoding="utf-8")
    done, called = demo(project, "one")
    assert done.returncode == 0 and called == ["pretrain", "sft", "evaluate"], done.stderr
    assert sum(minutes_of(project).values()) < given - 4  # 160 seconds count, and the evaluation takes longer there
    assert "all stages" in done.stdout and (project / "output/sft_one/demo.json").exists()


def test_the_budgets_of_slow_and_fast_machines():
    for seconds in (1, 10, 25, 60, 100):  # of the stages before, and of training the tokenizer
        times = {"chat": seconds, "tokenizer": seconds, "tokens": seconds, "chat-tokens": seconds, "pretrain other": 1}
        pretraining = budget.seconds("pretrain", times, "one")
        tuning = budget.seconds("sft", {**times, "pretrain one": round(pretraining)}, "one")
        evaluation = min(budget.MOST_EVALUATION, max(budget.LEAST_EVALUATION, budget.EVALUATION * seconds))
        assert 4 * seconds + pretraining + tuning + evaluation <= budget.LIMIT
        late = budget.seconds("sft", {**times, "pretrain one": round(1.1 * pretraining)}, "one")
        assert (
            budget.LEAST_TRAINING <= late <= max(budget.LEAST_TRAINING, tuning - 0.1 * pretraining + 1)
        )  # what pretraining took too much is saved here
        early = budget.seconds("sft", {**times, "pretrain one": 5}, "one")  # resumed just before its end
        assert tuning <= early < 0.4 * pretraining
    assert budget.seconds("pretrain", {"tokens": 5000}, "one") == budget.LEAST_TRAINING


def test_quick_has_an_output_folder_of_its_own(project):
    demo(project)
    done, called = demo(project, "--quick")
    assert done.returncode == 0 and "train_tokenizer" in called and "pretrain" in called, done.stderr
    assert (project / "output/quick/sft_mini_deepseekv3/demo.json").exists() and minutes_of(project) == {}
    assert demo(project)[1] == []  # and leaves the other alone


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ("model/one.py", ["pretrain", "sft", "evaluate"]),
        ("configs/one_cpu.yaml", ["pretrain", "sft", "evaluate"]),
        ("configs/sft_cpu.yaml", ["sft", "evaluate"]),
        ("output/tokenizer/tokenizer.json", ["train_tokenizer"]),  # replaced by another: ours is made again
    ],
)
def test_a_change_repeats_its_stage_and_those_after_it(project, changed, again):
    demo(project, "one")
    before = (project / changed).read_text(encoding="utf-8")
    (project / changed).write_text(before + "# changed\n", encoding="utf-8")
    done, called = demo(project, "one")
    assert done.returncode == 0 and called == again, done.stderr
    if changed.startswith("model"):
        assert "output/pretrain_one_2" in done.stdout  # the run before is kept
        (project / changed).write_text(before, encoding="utf-8")
        done, called = demo(project, "one")
        assert called == [] and "output/pretrain_one/" in done.stdout  # and found again when all is as it was


def test_an_interrupted_training_stops_the_demo_and_resumes_the_next_time(project):
    done, called = demo(project, STOP="pretrain")
    assert done.returncode == 2 and called[-1] == "pretrain" and "same command again" in done.stderr
    given = minutes_of(project)["pretrain"]
    times = project / "output/demo_times.json"
    times.write_text(json.dumps({**json.loads(times.read_text(encoding="utf-8")), "tokens": 300}), encoding="utf-8")
    done, called = demo(project)
    assert done.returncode == 0 and called == ["pretrain", "sft", "evaluate"]
    assert minutes_of(project)["pretrain"] == given  # else it would be another run, and would not resume


def test_fine_tuning_starts_from_the_run_that_the_stage_before_names(project):
    """Not from the one whose summary is the newest: a run that is finished already leaves its summary alone."""
    demo(project, "one")
    (project / "output/pretrain_one_2").mkdir()
    (project / "output/pretrain_one_2/summary.json").write_text('{"status": "finished"}', encoding="utf-8")
    placeholder = (project / "pretrain.py").read_text(encoding="utf-8")
    first = placeholder.replace('while (folder / "summary.json").exists()', "while False")
    (project / "pretrain.py").write_text(first, encoding="utf-8")  # finds its run finished, under the first name
    (project / "configs/one_cpu.yaml").write_text("max_lr: 1  # another comment\n", encoding="utf-8")
    done, called = demo(project, "one")
    assert called == ["pretrain", "sft", "evaluate"] and "--init_from=output/pretrain_one " in done.stdout


def test_a_failing_stage_stops_the_demo(project):
    (project / "train_tokenizer.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    done, _ = demo(project)
    assert done.returncode == 3 and "pretrain.py" not in done.stdout


def test_user_errors_are_one_line(project):
    done, _ = demo(project, "--fast")
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: unknown option --fast: bash run_demo.sh [MODEL] [--quick]"
    ]
    done, _ = demo(project, "one", "two")
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: one model at a time, not one and two: bash run_demo.sh [MODEL] [--quick]"
    ]
    shutil.rmtree(project / ".venv")
    done, _ = demo(project, "mini_deepseekv4")  # before a .venv is made
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.splitlines()
        == ["error: unknown model mini_deepseekv4: there are mini_deepseekv3 (a new one is a new file in model/)"]
    )
    done, _ = demo(project, PYTHON="/no/such/python")
    assert done.returncode == 2 and "PYTHON=/no/such/python is not a Python of version 3.11" in done.stderr
    old = project / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 2.7.18 && exit 0\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    done, _ = demo(project, PYTHON=str(old))
    assert done.returncode == 2 and "Python 2.7.18" in done.stderr


def test_help(project):
    done, called = demo(project, "--help")
    assert done.returncode == 0 and called == [] and "bash run_demo.sh [MODEL] [--quick]" in done.stdout
