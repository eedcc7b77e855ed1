"""Flat dataclass configs from the command line and YAML presets.

    @dataclass
    class ToyConfig:
        max_lr: float = opt(0.02, "peak learning rate")

    config = parse(ToyConfig)          # --max_lr=0.1 | --max_lr 0.1 | --config preset.yaml

Precedence: dataclass default < preset < command line. An unknown key is an error with a suggestion.
A config with a field `model: dict` also takes `--model.n_layers=4` and a `model:` mapping in the preset: the
architecture's own arguments, checked against the dataclass that `model_args(model_name)` returns.
"""

import dataclasses
import difflib
import math
import operator
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

import yaml

from utils.errors import UserError
from utils.files import project_path
from utils.version import VERSION

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigType = typing.TypeVar("ConfigType", bound="DataclassInstance")
Fields = dict[str, dataclasses.Field]

SWITCH = ("auto", "true", "false")  # choices of a setting that can also decide by itself: --compile, --no_compile
HELP_FLAGS = ("--help", "-h")
BOUNDS = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}
SHARED_ARGS = {"vocab_size": "the tokenizer", "max_seq_len": "--max_seq_len"}  # model arguments set from elsewhere


def opt(
    default: typing.Any,
    help: str,
    choices: tuple = (),
    neutral: bool = False,
    path: bool = False,
    group: str = "",
    **bounds: float,
) -> typing.Any:
    """Return a dataclass field of a config.

    neutral: the setting does not affect the result, so that resuming ignores it. path: a file or a folder, which
    `parse` resolves by `utils.files.project_path`. group: a heading in --help, set on the first field of a group.
    bounds: any of ge, gt, le, lt; `check_bounds` tests them, for a tuple in each of its elements.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "neutral": neutral,
        "path": path,
        "group": group,
        "bounds": bounds,
    }
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_bounds(config: "DataclassInstance") -> None:
    """Raise UserError for a field outside the bounds of its `opt`; call it in `__post_init__`."""
    for field in dataclasses.fields(config):
        bounds = field.metadata.get("bounds") or {}
        value = getattr(config, field.name)
        values = value if isinstance(value, (tuple, list)) else [] if value is None else [value]
        if not all(BOUNDS[kind][1](each, limit) for kind, limit in bounds.items() for each in values):
            wanted = " and ".join(f"{BOUNDS[kind][0]} {limit:g}" for kind, limit in bounds.items())
            raise UserError(f"--{field.name}={value}: must be {wanted}")


def parse(
    config_class: type[ConfigType],
    argv: list[str] | None = None,
    model_args: Callable[[str], type] | None = None,
) -> ConfigType:
    """Build a config from `argv` (default: the command line).

    model_args: function from a model's name to its args dataclass, for typing `--model.*` and for --help.
    Raises UserError on an unknown key, a value of the wrong type or outside the choices. --help prints and exits.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--version" in argv:
        print(VERSION)
        raise SystemExit(0)
    wants_help = any(word in HELP_FLAGS for word in argv)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    hints = typing.get_type_hints(config_class)
    flags = _read_flags([word for word in argv if word not in HELP_FLAGS], fields, hints)
    preset_path = flags.pop("config", None)
    preset = {} if preset_path is None else _read_preset(preset_path)
    values, model_values = _split_values(preset | flags, fields, hints)

    name = values.get("model_name", getattr(fields.get("model_name"), "default", ""))
    needs_args = model_args is not None and name and (model_values or wants_help)
    args_class = model_args(name) if model_args is not None and needs_args else None
    if wants_help:
        print(help_text(config_class, args_class, name))
        raise SystemExit(0)
    if "model" in fields:
        values["model"] = typed_model_values(model_values, args_class)
    for key, field in fields.items():
        if field.metadata.get("path"):
            values[key] = project_path(values.get(key, field.default))
    return config_class(**values)


def _read_flags(argv: list[str], fields: Fields, hints: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """`--key=value`, `--key value`, `--flag`, `--no_flag` -> {key: text}."""
    flags = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected {word!r}: settings are written --key=value (--help lists them)")
        key, equals, value = word[2:].partition("=")
        if not equals:
            key, value = _read_value(key, words, fields, hints)
        flags[key] = value
    return flags


def _read_value(key: str, words: list[str], fields: Fields, hints: dict[str, typing.Any]) -> tuple[str, str]:
    """The key and value of a flag without `=`: a switch, or the next of `words`, which is then removed."""

    def is_switch(name: str) -> bool:
        return name in fields and (hints[name] is bool or "true" in fields[name].metadata.get("choices", ()))

    positive = key.removeprefix("no_")
    if key not in fields and is_switch(positive):
        return positive, "false"
    if words and not words[0].startswith("--"):
        return key, words.pop(0)
    if is_switch(key):
        return key, "true"
    if key in fields or key == "config" or key.startswith("model."):
        raise UserError(f"--{key} needs a value: --{key}=...")
    return key, ""  # an unknown key, which the caller reports


def _read_preset(path: str) -> dict[str, typing.Any]:
    """The settings of a preset, its `model:` mapping as `model.<field>`."""
    preset = load_yaml(project_path(path))
    model_part = preset.pop("model", None) or {}
    if not isinstance(model_part, dict):
        raise UserError(f"{path}: `model:` must be a mapping of architecture fields")
    return preset | {f"model.{key}": value for key, value in model_part.items()}


def _split_values(
    given: dict[str, typing.Any], fields: Fields, hints: dict[str, typing.Any]
) -> tuple[dict[str, typing.Any], dict[str, typing.Any]]:
    """The values of the config, converted to their types, and those of the architecture, as they were given."""
    values = {}
    model_values = {}
    for key, value in given.items():
        if key.startswith("model.") and "model" in fields:
            model_values[key.removeprefix("model.")] = value
        elif key in fields and key != "model":
            values[key] = convert(value, hints[key], f"--{key}", fields[key].metadata.get("choices", ()))
        else:
            raise UserError(unknown_key(key, [name for name in fields if name != "model"] + ["config"]))
    return values, model_values


def typed_model_values(values: dict[str, typing.Any], args_class: type | None) -> dict[str, typing.Any]:
    """Check architecture values against their dataclass and convert them to its types."""
    if args_class is None:
        return values
    hints = typing.get_type_hints(args_class)
    names = [field.name for field in dataclasses.fields(args_class)]
    for key in values:
        if key not in names:
            raise UserError(unknown_key(f"model.{key}", [f"model.{name}" for name in names]))
        if key in SHARED_ARGS:
            raise UserError(f"model.{key} comes from {SHARED_ARGS[key]}: do not set it in the model's own fields")
    return {key: convert(value, hints[key], f"--model.{key}") for key, value in values.items()}


def unknown_key(key: str, known: list[str]) -> str:
    """The one-line message for an unknown key, with the nearest known one."""
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
    return f"unknown setting --{key}: " + (f"did you mean --{near[0]}?" if near else "--help lists the settings")


def convert(value: typing.Any, hint: typing.Any, flag: str, choices: tuple = ()) -> typing.Any:
    """Convert a text (command line) or a YAML value to the field's type; UserError names the flag when it cannot."""
    try:
        result = _convert(value, hint)
    except (ValueError, TypeError):
        kind = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
        raise UserError(f"{flag}={value}: expected {kind}") from None
    if choices and result not in choices:
        raise UserError(f"{flag}={value}: expected one of {', '.join(map(str, choices))}")
    return result


def _convert(value: typing.Any, hint: typing.Any) -> typing.Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = typing.get_args(hint)
        if type(None) in inner and (value is None or str(value).lower() in ("none", "null")):
            return None
        return _convert(value, next(kind for kind in inner if kind is not type(None)))
    if origin in (list, tuple) or hint in (list, tuple):
        return _convert_sequence(value, origin or hint, typing.get_args(hint))
    if hint is bool:
        return _convert_bool(value)
    if hint in (int, float):
        return _convert_number(value, hint)
    if hint is str:
        if isinstance(value, bool):  # YAML's true, for a switch such as compile
            return str(value).lower()
        return "" if value is None else str(value)
    return value


def _convert_sequence(value: typing.Any, kind: type, inner: tuple) -> typing.Any:
    """A list or a tuple from a YAML list or from `a,b`, `[a, b]` or `('a', 'b')`. inner: the types of its elements."""
    if isinstance(value, str):
        parts = [part.strip(" '\"") for part in value.strip("[]() ").split(",")]
        value = [part for part in parts if part]
    kinds = [each for each in inner if each is not Ellipsis] or [str]
    fixed = kind is tuple and Ellipsis not in inner and inner
    if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(inner)):
        raise ValueError
    return kind(_convert(each, kinds[i] if fixed else kinds[0]) for i, each in enumerate(value))


def _convert_bool(value: typing.Any) -> bool:
    text = str(value).lower().replace("_", "")
    if text not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError
    return text in ("true", "1", "yes")


def _convert_number(value: typing.Any, kind: type) -> int | float:
    if isinstance(value, bool):
        raise ValueError
    if kind is int and isinstance(value, int):
        return value  # not through float: that would round beyond 2^53
    number = float(str(value).lower().replace("_", ""))
    if not math.isfinite(number) or (kind is int and number != int(number)):  # 1e6 is a fine integer, 1.5 is not
        raise ValueError
    return kind(number)


def load_yaml(path: str | Path) -> dict[str, typing.Any]:
    """Read a YAML mapping; UserError when the file is missing or is no mapping."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path}: give --config the path of a .yaml file")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines")
    return values


def to_dict(config: "DataclassInstance") -> dict[str, typing.Any]:
    """The config as plain YAML/JSON types, in field order."""
    values = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def help_text(config_class: type, args_class: type | None = None, model_name: str = "") -> str:
    """Every setting with its type, default and meaning, and the fields of the chosen architecture."""
    doc = (config_class.__doc__ or "").strip()
    lines = [doc, ""] if doc and not doc.startswith(config_class.__name__ + "(") else []
    lines.append("Settings (--key=value; --config=preset.yaml reads them from a file):")
    fields = dataclasses.fields(config_class)
    for field in fields:
        if group := field.metadata.get("group"):
            lines += ["", f" {group}:"]
        if field.name != "model":
            lines.append(_help_line(f"--{field.name}", field))
    if args_class is not None:
        lines += ["", f"Architecture of {model_name} (--model.key=value):"]
        for field in dataclasses.fields(args_class):
            if field.name not in SHARED_ARGS:
                lines.append(_help_line(f"--model.{field.name}", field))
    elif any(field.name == "model" for field in fields):
        lines += ["", "Architecture fields are set by --model.key=value; add --model_name=... to list them."]
    return "\n".join(lines)


def _help_line(flag: str, field: dataclasses.Field) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"
    if isinstance(default, (tuple, list)):
        default = ",".join(map(str, default))
    choices = field.metadata.get("choices", ())
    meaning = field.metadata.get("help", "") + (f" [{'|'.join(map(str, choices))}]" if choices else "")
    return f"  {flag + '=' + str(default):<44} {meaning}".rstrip()
