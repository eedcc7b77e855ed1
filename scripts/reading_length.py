"""Counts the lines that a learner reads for one architecture: python scripts/reading_length.py MODEL

The architecture's file and all that it imports from model/, followed to the end; without the faster forms
(model/kernels/), the tables of published names (model/hf/) and files that only re-export names.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import model_file  # noqa: E402
from utils.errors import UserError, run_script  # noqa: E402

NOT_READ = ("model.kernels", "model.hf")


def imported_files(path: Path) -> list[Path]:
    """Return the files in model/ that the file at `path` imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            package = ["model", *path.relative_to(ROOT / "model").parts[:-1]] if node.level else []
            module = ".".join([*package, node.module])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [file for name in names if (file := _file_of(name)) is not None]
    return found


def _file_of(module: str) -> Path | None:
    """The file in model/ of a module that a learner reads, else None."""
    if not module.startswith("model.") or any(f"{module}.".startswith(f"{name}.") for name in NOT_READ):
        return None
    base = ROOT.joinpath(*module.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.exists()), None)


def reading_list(first: Path) -> dict[Path, int]:
    """Return {file: lines} of all that is read for the architecture in `first`, in the order of its imports."""
    lines: dict[Path, int] = {}
    waiting = [first]
    while waiting:
        path = waiting.pop(0)
        if path in lines:
            continue
        lines[path] = 0 if path.name == "__init__.py" else len(path.read_text(encoding="utf-8").splitlines())
        waiting += imported_files(path)
    return {path: count for path, count in lines.items() if count}


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("name one architecture: python scripts/reading_length.py MODEL")
    lines = reading_list(Path(model_file(sys.argv[1])))
    for path, count in lines.items():
        print(f"{count:6}  {path.relative_to(ROOT)}")
    print(f"{sum(lines.values()):6}  in total")


if __name__ == "__main__":
    run_script(main)
