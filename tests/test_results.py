"""The figures of README and docs/results come from benchmarks/results, and from nowhere else."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PAGES = ["README.md", "README.zh-CN.md", "docs/results.md", "docs/results.zh-CN.md"]
BLOCK = re.compile(r"<!-- results: \w+ -->\n.*?<!-- end -->", re.DOTALL)
MEASURED = re.compile(r"\d[\d.,]*\s?(?:x\b|倍|%|MiB|MB/s|tokens/s|tokens per second|词元/秒|ms\b|毫秒|bits)")


def check(root) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/write_results.py", "--check"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)


def test_every_figure_is_the_one_in_the_results():
    done = check(ROOT)
    assert done.returncode == 0, done.stdout


def test_a_changed_result_or_page_is_noticed(tmp_path):
    for name in ("scripts", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    page = tmp_path / "README.md"
    page.write_text(page.read_text(encoding="utf-8").replace("6.459", "6.458"), encoding="utf-8")
    done = check(tmp_path)
    assert done.returncode == 1 and "README.md" in done.stdout and "docs/results.md" not in done.stdout
    results = tmp_path / "benchmarks/results/decode.json"
    results.write_text(results.read_text(encoding="utf-8").replace("1627.5", "1727.5"), encoding="utf-8")
    done = check(tmp_path)
    assert done.returncode == 1 and "docs/results.zh-CN.md" in done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_no_measured_figure_outside_the_written_blocks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- results: " in text
    found = MEASURED.findall(BLOCK.sub("", text))
    assert not found, f"{page}: {found}: put them into benchmarks/results and scripts/write_results.py"


def test_the_shares_of_a_demo_are_those_of_its_report():
    from benchmarks.demo_results import shares
    from demo import report

    counts = {"poems": 50, "in_form": 47, "rhyming": 4, "verses": 200, "copied": 3}
    shown = [
        report.share(counts[a], counts[b])
        for a, b in (("in_form", "poems"), ("rhyming", "poems"), ("copied", "verses"))
    ]
    assert [f"{100 * share:.1f}%" for share in shares(counts).values()] == shown
