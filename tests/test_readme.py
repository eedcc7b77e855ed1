"""The READMEs and how-tos are correct: files and flags exist, both languages have the same commands."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support.models import SHIPPED

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "README.zh-CN.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))]
ARCHITECTURES = [page for page in PAGES if page.startswith("docs/architectures/") and not page.endswith(".zh-CN.md")]
# Files that a command of the same page makes, or placeholders for the reader's own.
MADE_BY_THE_READER = {"model/my_net.py", ".venv/bin/activate", "configs/x.yaml"}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: str) -> list[tuple[str, list[str]]]:
    """Return folder and words of every command in the bash blocks of a page, in order."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", read(page), re.DOTALL):
        folder = "."
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s#.*", "", line).strip()
            if not line or "<" in line:  # a placeholder for the address of the repository
                continue
            words = shlex.split(line)
            if words[0] == "cd":
                folder = str((Path(folder) / words[1]).as_posix()) if words[1] != ".." else "."
                continue
            found.append((folder, words))
    return found


@cache
def help_of(folder: str, script: str, *model: str) -> str:
    done = subprocess.run(
        [sys.executable, script, *model, "--help"], cwd=ROOT / folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_files_and_flags_that_exist(page):
    for folder, words in commands(page):
        script = next((w for w in words if w.endswith((".py", ".sh")) and w not in MADE_BY_THE_READER), None)
        if script is None:
            continue
        assert (ROOT / folder / script).exists(), f"{page}: {shlex.join(words)}"
        if not script.endswith(".py") or words[0] == "sed":
            continue
        arguments = words[words.index(script) + 1 :]
        for argument in arguments:
            if argument.startswith("--") and argument not in ("--", "--help"):
                flag = argument.split("=")[0]
                action = arguments[:1] if not arguments[0].startswith("--") else []
                if flag.startswith("--model."):
                    action += [word for word in arguments if word.startswith(("--config=", "--model_name="))]
                assert re.search(f"{flag}[= ]", help_of(folder, script, *action)), f"{page}: {script} has no {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", read(page)):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_flags_named_in_the_text_exist(page):
    known = help_of(".", "pretrain.py") + help_of(".", "sft.py") + help_of(".", "export.py")
    known += help_of(".", "serve.py") + help_of(".", "test.py")
    known += help_of("preprocess_data", "preprocess_data.py", "pretrain")
    known += "--config= --help= --all= --quick= --prompt= --tokenizer_path="
    for flag in set(re.findall(r"--[a-z][a-z_]+", read(page))):
        assert re.search(f"{flag}[= ]", known) or flag in ("--nproc_per_node", "--logdir", "--model"), f"{page}: {flag}"


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_tree_shows_what_is_there(page):
    tree = re.search(r"```\n(run_demo\.sh.*?)```", read(page), re.DOTALL)[1]
    folder = ""
    for line in tree.splitlines():
        names = re.split(r"\s{3,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = names[0] if names[0].endswith("/") else ""
        for name in names:
            path = ROOT / (folder if line.startswith(" ") else "") / name
            assert path.exists() or name == "output/", f"{page}: {line}"


def test_both_languages_give_the_same_commands():
    assert commands("README.md") == commands("README.zh-CN.md")
    tables = [re.findall(r"^\|.*\|$", read(page), re.MULTILINE) for page in ("README.md", "README.zh-CN.md")]
    assert len(tables[0]) == len(tables[1])


@pytest.mark.parametrize("page", ARCHITECTURES)
def test_pages_of_architectures_are_the_same_in_both_languages(page):
    other = page.removesuffix(".md") + ".zh-CN.md"
    assert commands(page) == commands(other)
    for part in (r"^\|.*\|$", r"^#+ ", r"^!\["):  # tables, headings, pictures
        assert len(re.findall(part, read(page), re.MULTILINE)) == len(re.findall(part, read(other), re.MULTILINE)), part


@pytest.mark.parametrize("page", ["docs/architectures/README.md", "docs/architectures/README.zh-CN.md"])
def test_the_index_of_architectures_is_complete(page):
    for name in SHIPPED:
        assert f"`{name}`" in read(page), f"{page} has no line for {name}"
    for path in (ROOT / "docs/architectures").glob("*.md"):
        if path.name.endswith(".zh-CN.md") == page.endswith(".zh-CN.md"):
            assert f"]({path.name})" in read(page) or path.name.startswith("README"), (
                f"{page} does not link {path.name}"
            )
