"""Discovery: every file in this folder that holds a `BaseModel` subclass with a `model_name` is an architecture.

Drop `mynet.py` here and `--model_name=mini_mynet` works in every script. Sub-folders are not searched.
"""

import ast
import difflib
import importlib
import inspect
import re
import traceback
from pathlib import Path

from model.basemodel import BaseModel, BaseModelArgs, ModelError, State

__all__ = ["BaseModel", "BaseModelArgs", "ModelError", "State", "get_model_and_args", "list_models", "model_file"]

FOLDER = Path(__file__).parent
NOT_ARCHITECTURES = ("__init__", "basemodel", "new", "template")
NAME_PATTERN = re.compile(r"[a-z0-9_]{1,64}")


def _names_in_source(path):
    """The `model_name = "..."` of a file, read without running it: needed when the file cannot be imported."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return re.findall(r"model_name\s*=\s*[\"']([^\"']+)[\"']", path.read_text(encoding="utf-8", errors="replace"))
    return [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == "model_name" for target in node.targets)
        and isinstance(node.value, ast.Constant)
    ]


def _models_of(module, file):
    """Yield (name, Model, ModelArgs or an error message) for each architecture that `module` defines."""
    for Model in vars(module).values():
        if not (inspect.isclass(Model) and issubclass(Model, BaseModel) and Model.__module__ == module.__name__):
            continue
        name = Model.__dict__.get("model_name")
        if name is None:  # a shared parent class, not an architecture
            continue
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
            yield str(name), Model, f"{file}: model_name {name!r} must match [a-z0-9_]{{1,64}}: rename it"
            continue
        args_name = Model.__name__.removesuffix("Model") + "ModelArgs"
        ModelArgs = getattr(module, args_name, None)
        if not (inspect.isclass(ModelArgs) and issubclass(ModelArgs, BaseModelArgs)):
            ModelArgs = (
                f"{file}: {Model.__name__} needs a dataclass {args_name}(BaseModelArgs) in the same file: add it"
            )
        yield name, Model, ModelArgs


def _discover():
    """Import every file once. Return ({name: (Model, ModelArgs)}, {name: why it cannot be used})."""
    good, bad, broken = {}, {}, {}
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem in NOT_ARCHITECTURES:
            continue
        file = f"model/{path.name}"
        try:
            module = importlib.import_module(f"{__name__}.{path.stem}")
        except (Exception, SystemExit) as error:
            hint = " (CHANGELOG.md lists what has moved)" if isinstance(error, ImportError) else ""
            for name in _names_in_source(path) or [path.stem]:
                broken[name] = f"{file} does not import: fix the error below{hint}\n{traceback.format_exc()}"
            continue
        for name, Model, ModelArgs in _models_of(module, file):
            if name in good or name in bad:
                first = inspect.getfile(good[name][0]) if name in good else "another file"
                bad[name] = f"{file}: model_name {name!r} is taken by {Path(first).name}: choose another"
                good.pop(name, None)
            elif isinstance(ModelArgs, str):
                bad[name] = ModelArgs
            else:
                good[name] = (Model, ModelArgs)
    # A file that does not import never takes another down, not even one with the same model_name.
    return good, {**{name: why for name, why in broken.items() if name not in good}, **bad}


_found = None


def _registry():
    global _found
    if _found is None:
        _found = _discover()
    return _found


def list_models():
    """Return the sorted names of all usable architectures."""
    return sorted(_registry()[0])


def get_model_and_args(name):
    """Return `(Model, ModelArgs)`, the two classes of the architecture called `name`.

    Raises `ModelError` for an unknown name (with suggestions) and for a file that exists but cannot be used.
    """
    good, bad = _registry()
    if name in good:
        return good[name]
    if name in bad:
        raise ModelError(bad[name])
    near = difflib.get_close_matches(str(name), [*good, *bad], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(sorted(good))}"
    raise ModelError(f"unknown model {name!r}: {hint} (a new one is a new file in model/)")


def model_file(name):
    """Return the `Path` of the file that defines the architecture called `name`."""
    return Path(inspect.getfile(get_model_and_args(name)[0]))
