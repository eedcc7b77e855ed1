"""The shape of the project, held over its files: imports run one way, small functions, no error-prone calls."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from model import model_file
from tests.support.models import SHIPPED
from tests.support.paths import ROOT, folder_of, name_of, source_files

# What the files of a folder may import of ours; "" is the scripts of the root. Of two entries that fit, the
# longer one counts.
MAY_IMPORT = {
    "utils": {"utils"},
    "model": {"model", "utils.errors"},
    "model.layers": {"model.layers", "model.kernels", "utils.errors"},
    "model.kernels": {"model.kernels", "utils.errors"},
    "engine.data": {"engine.data"},
    "engine.distributed": {"engine.distributed"},
    "engine.runs": {"engine.runs", "engine.distributed"},
    "engine.planning": {"engine.planning", "engine.distributed", "engine.data", "engine.runs"},
    "engine.inference": {"engine.inference", "engine.runs", "engine.distributed"},
    "engine.training": {
        "engine.training", "engine.data", "engine.runs", "engine.distributed", "engine.planning", "engine.inference",
    },
    "engine.serving": {"engine.serving", "engine.inference", "engine.runs"},
    "engine.interchange": {"engine.interchange", "engine.runs"},
    "checks": {"checks", "model"},
    "preprocess_data": {"preprocess_data"},
    "demo": {"demo", "engine", "model", "preprocess_data"},
    "web": {"web", "engine"},
    "": {"engine", "model", "checks", "web", "preprocess_data"},
}  # fmt: skip
MODEL_FOR_THE_ENGINE = {"model", "model.basemodel", "model.kernels.prepare"}
OURS = {"utils", "model", "engine", "checks", "preprocess_data", "demo", "web", "tests", "benchmarks", "scripts"}

# Where a model may be called by its name.
NAMES_ALLOWED = (
    "model/",
    "configs/",
    "docs/",
    "demo/",
    "tests/",
    "benchmarks/",
    "README",
    "run_demo.sh",
)

# What has bitten others: code hidden in data, markup hidden in text, errors hidden from the user.
FORBIDDEN = {
    "a pickle that runs code": r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|\bpickle\.loads?\(|\bjoblib\.load",
    "YAML that builds any object": r"\byaml\.(load|unsafe_load|full_load)\(",
    "raw HTML in the page": r"unsafe_allow_html|allow_dangerous_html|st\.html\(|components\.v1\.html\(",
    "a model's own code": r"trust_remote_code\s*=\s*True",
    "a shell made of strings": r"\bos\.system\(|\bos\.popen\(|shell\s*=\s*True",
    "text run as code": r"(?<![\w.])(eval|exec)\(",
    "a hidden error": r"^\s*except\s*:",
}


FILES = source_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]


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


def package_of(path: Path) -> str:
    """Return the dotted name of a file's folder."""
    return ".".join(path.relative_to(ROOT).parent.parts)


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@cache
def module_named(dotted: str) -> str:
    """Return the module that holds `dotted`, which may be a name in it."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:n])
        if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
            return ".".join(parts[:n])
    return parts[0]


def rule_of(path: Path) -> set[str]:
    """Return what a file may import of ours."""
    package = package_of(path)
    fitting = [name for name in MAY_IMPORT if name == package or name and package.startswith(name + ".")]
    allowed = MAY_IMPORT[max(fitting, key=len)]
    if package.startswith("engine"):
        allowed = allowed | MODEL_FOR_THE_ENGINE
    return allowed if package == "model" or package.startswith("model.") else allowed | {"utils"}


@pytest.mark.parametrize(
    "path", [p for p in PYTHON if within(package_of(p), set(MAY_IMPORT)) and p.parent != ROOT / "engine"], ids=name_of
)
def test_imports_run_one_way(path):
    allowed, scripts = rule_of(path), {p.stem for p in ROOT.glob("*.py")}
    for line, dotted in imports(path):
        module, first = module_named(dotted), dotted.split(".")[0]
        fits = (
            module in allowed if package_of(path).startswith("engine") and first == "model" else within(module, allowed)
        )
        assert first not in OURS or fits, f"{name_of(path)}:{line} imports {dotted}"
        assert first not in scripts or first in OURS, f"{name_of(path)}:{line} imports the script {dotted}"


def test_every_package_of_the_engine_has_a_rule():
    packages = {package_of(path) for path in PYTHON if folder_of(path) == "engine"} - {"engine"}
    assert packages <= MAY_IMPORT.keys()


def test_no_two_modules_import_each_other():
    """Nor along a longer way round. Imports inside of functions count as well."""
    graph = {}
    for path in PYTHON:
        if folder_of(path) != "tests":
            own = module_named(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
            targets = {module_named(dotted) for _, dotted in imports(path) if dotted.split(".")[0] in OURS}
            graph[own] = targets - {own}
    done, way = set(), []

    def visit(module):
        if module in way:
            raise AssertionError("these import each other: " + " -> ".join([*way[way.index(module) :], module]))
        if module not in done:
            way.append(module)
            for target in sorted(graph.get(module, ())):
                visit(target)
            way.pop()
            done.add(module)

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize("path", [p for p in PYTHON if folder_of(p) == "tests"], ids=name_of)
def test_a_test_imports_from_no_other_test(path):
    for line, module in imports(path):
        assert not module.startswith("tests.test_"), f"{name_of(path)}:{line}: move it into tests/support/"


@pytest.mark.parametrize("path", [p for p in PYTHON if folder_of(p) == "model"], ids=name_of)
def test_a_model_needs_torch_and_its_own_folder_only(path):
    for line, module in imports(path):
        first = module.split(".")[0]
        assert first in {"torch", "model"} or first in sys.stdlib_module_names or within(module, {"utils.errors"}), (
            f"{name_of(path)}:{line} {module}"
        )
        assert not module.startswith(("torch.distributed", "torch.utils.tensorboard")), f"{name_of(path)}:{line}"


def test_no_model_name_where_every_model_is_meant():
    names = {*SHIPPED, *(model_file(name).stem for name in SHIPPED)}
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


@pytest.mark.parametrize("path", [p for p in PYTHON if folder_of(p) != "tests"], ids=name_of)
def test_files_are_small_and_open_with_a_sentence(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 500, "a file holds one idea: split it"
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "describe in one sentence what the file is for"


def test_functions_are_short():
    """At most 80 lines. Ruff holds the cyclomatic complexity (C901 in pyproject.toml)."""
    long = [
        f"{name_of(path)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in PYTHON
        if folder_of(path) != "tests"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 80
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("name, most", [("mini_deepseekv3", 340), ("mini_llama3", 115)])
def test_an_architecture_reads_as_its_paper(name, most):
    """The file alone is short, and under 900 lines with what it imports of the contract and the layers."""
    assert len(Path(model_file(name)).read_text(encoding="utf-8").splitlines()) <= most
    done = subprocess.run(
        [sys.executable, "scripts/reading_length.py", name], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"(\d+)  in total", done.stdout)[1]) < 900, done.stdout


def test_no_compiler_branch_outside_the_kernels():
    calls = [
        name_of(path)
        for path in PYTHON
        if folder_of(path) != "tests" and not name_of(path).startswith("model/kernels/")
        if "is_compiling(" in path.read_text(encoding="utf-8")
    ]
    assert not calls


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".sh" or name_of(p) == ".ci/run"], ids=name_of)
def test_shell_scripts_parse_and_stop_at_the_first_error(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    sourced = text.startswith("# Sourced by")
    assert sourced or (text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text)
