"""The shape of the project, held over its files: imports run one way, no model names, no error-prone calls."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from model import list_models, model_file

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".git", ".venv", "output", "__pycache__", "node_modules", ".pytest_cache", ".ruff_cache"}

# Which of our packages the files of a folder may import; "" stands for the scripts of the root.
MAY_IMPORT = {
    "utils": {"utils"},
    "model": {"model"},
    "engine": {"engine", "model", "utils"},
    "checks": {"checks", "model", "utils"},
    "preprocess_data": {"preprocess_data", "utils"},
    "demo": {"demo", "engine", "model", "preprocess_data", "utils"},
    "page": {"engine", "page", "utils"},
    "": {"engine", "model", "checks", "page", "preprocess_data", "utils"},
}
OURS = set(MAY_IMPORT) - {""} | {"tests", "benchmarks"}

# Where a model may be called by its name.
NAMES_ALLOWED = ("model/", "configs/", "docs/", "demo/", "tests/", "benchmarks/", "README", "run_demo.sh")

# What has bitten others: code hidden in data, markup hidden in text, errors hidden from everybody.
FORBIDDEN = {
    "a pickle that runs code": r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|\bpickle\.loads?\(|\bjoblib\.load",
    "YAML that builds any object": r"\byaml\.(load|unsafe_load|full_load)\(",
    "raw HTML in the page": r"unsafe_allow_html|allow_dangerous_html|st\.html\(|components\.v1\.html\(",
    "a model's own code": r"trust_remote_code\s*=\s*True",
    "a shell made of strings": r"\bos\.system\(|\bos\.popen\(|shell\s*=\s*True",
    "text run as code": r"(?<![\w.])(eval|exec)\(",
    "an error nobody sees": r"^\s*except\s*:",
}


def source_files() -> list[Path]:
    """Return what git tracks or would track, and every file where there is no git."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.split("\0")  # fmt: skip
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        files = [path for path in ROOT.rglob("*") if path.is_file()]
    return sorted(path for path in files if path.is_file() and not SKIPPED & set(path.relative_to(ROOT).parts))


FILES = source_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> list[tuple[int, str]]:
    """Return line and dotted name of everything a file imports, at any depth of its syntax tree."""
    found = []
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def folder_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", [p for p in PYTHON if folder_of(p) in MAY_IMPORT], ids=name_of)
def test_imports_run_one_way(path):
    allowed, scripts = MAY_IMPORT[folder_of(path)], {p.stem for p in ROOT.glob("*.py")}
    for line, module in imports(path):
        first = module.split(".")[0]
        assert first not in OURS or first in allowed, f"{name_of(path)}:{line} imports {module}"
        assert first not in scripts or first in allowed, f"{name_of(path)}:{line} imports the script {module}"


@pytest.mark.parametrize("path", [p for p in PYTHON if folder_of(p) == "model"], ids=name_of)
def test_a_model_needs_torch_and_its_own_folder_only(path):
    for line, module in imports(path):
        first = module.split(".")[0]
        assert first in {"torch", "model"} or first in sys.stdlib_module_names, f"{name_of(path)}:{line} {module}"
        assert not module.startswith(("torch.distributed", "torch.utils.tensorboard")), f"{name_of(path)}:{line}"


def test_no_model_name_where_every_model_is_meant():
    names = {*list_models(), *(model_file(name).stem for name in list_models())}
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))), re.IGNORECASE)
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in FILES
        if path.suffix in {".py", ".sh", ".toml", ".txt", ".yaml", ".cfg", ""} or name_of(path) == ".ci/run"
        if not name_of(path).startswith(NAMES_ALLOWED)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_error_prone_call(what):
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
    found = []
    for path in PYTHON:
        if folder_of(path) == "tests":  # tests name what must not be there
            continue
        text = path.read_text(encoding="utf-8")
        lines = [(text.count("\n", 0, hit.start()) + 1, hit[0]) for hit in pattern.finditer(text)]
        found += [f"{name_of(path)}:{line}: {hit}" for line, hit in lines]
    assert not found, f"{what}: " + ", ".join(found)


@pytest.mark.parametrize("path", [p for p in PYTHON if folder_of(p) not in {"tests"}], ids=name_of)
def test_files_are_small_and_open_with_a_sentence(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= (450 if folder_of(path) == "model" else 400), "a file holds one idea: split it"
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "say in one sentence what the file is for"


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".sh" or name_of(p) == ".ci/run"], ids=name_of)
def test_shell_scripts_parse_and_stop_at_the_first_error(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    sourced = text.startswith("# Sourced by")
    assert sourced or (text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text)
