"""The keys of a published config.json: paths into nested objects, types, and rotary scaling."""

import math
import typing
from collections.abc import Callable
from dataclasses import fields

from model.layers.rotary import RopeArgs, rope_amplitude
from utils.errors import ModelError

SCALING = {  # our argument: the key of config.json's rope_scaling, for each kind
    "default": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {
        "rope_factor": "factor",
        "rope_original_max_seq_len": "original_max_position_embeddings",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "rope_factor": "factor",
        "rope_original_max_seq_len": "original_max_position_embeddings",
        "rope_beta_slow": "beta_slow",
        "rope_beta_fast": "beta_fast",
        "rope_mscale": "mscale",
        "rope_mscale_all_dim": "mscale_all_dim",
        "rope_truncate": "truncate",
    },
}
UNLESS_DEFAULT = ("rope_truncate",)  # written only where it is not what others assume
UNREADABLE = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)  # of a value of another type
TYPES = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}


class Key:
    """Where config.json holds an argument, where that is more than one key of its own.

    paths: keys, with dots into nested objects ("rope_parameters.full_attention.rope_theta"); the value is written to
    each, and read from the first that is there, and the others must agree. write(ours, args) -> theirs, read(theirs,
    config) -> ours.
    """

    def __init__(
        self,
        *paths: str,
        write: Callable = lambda value, args: value,
        read: Callable = lambda value, config: value,
    ):
        self.paths = paths
        self.write = write
        self.read = read

    def get(self, config):
        """Return our value and its path in `config`; (None, path) where it has none."""
        found = {path: get_path(config, path) for path in self.paths}
        found = {path: value for path, value in found.items() if value is not None}
        if not found:
            return None, self.paths[0]
        path, value = next(iter(found.items()))
        for other in found:
            if found[other] != value:
                raise ModelError(f"config.json has {path}={value!r} and {other}={found[other]!r}: make them agree")
        try:
            return self.read(value, config), path
        except UNREADABLE:
            raise ModelError(f"config.json has {path}={value!r}, which cannot be read: correct it") from None


def get_path(config, path):
    """Return the value at a dotted path, None where there is none; ModelError where an object should be."""
    *outer, last = path.split(".")
    for depth, key in enumerate(outer):
        config = config.get(key)
        if config is None:
            return None
        if not isinstance(config, dict):
            where = ".".join(outer[: depth + 1])
            raise ModelError(f"config.json has {where}={config!r}, and it must be an object: correct it")
    return config.get(last)


def put_path(config, path, value):
    """Set the value at a dotted path; tuples become lists, as JSON has them."""
    *outer, last = path.split(".")
    for key in outer:
        config = config.setdefault(key, {})
    config[last] = list(value) if isinstance(value, tuple) else value


def typed(value, key, kind, where="config.json"):
    """Return the value of `key`; ModelError unless it is of the type `kind` (an int may be given for a float)."""
    origin = typing.get_origin(kind) or kind
    if origin in (list, tuple):
        inner = [each for each in typing.get_args(kind) if each is not Ellipsis] or [object]
        if not isinstance(value, list | tuple):
            raise ModelError(f"{where} has {key}={value!r}, and it must be a list: correct it")
        return origin(typed(each, f"{key}[{i}]", inner[0], where) for i, each in enumerate(value))
    if kind is float and type(value) is int:
        value = float(value)
    if kind in TYPES and (type(value) is not kind or (kind is float and not math.isfinite(value))):
        raise ModelError(f"{where} has {key}={value!r}, and it must be {TYPES[kind]}: correct it")
    return value


def write_rope(config, args, path, with_theta):
    """Write the rotary scaling of `args` to `path`, or to rope_theta and rope_scaling where that is empty."""
    scaling = {
        theirs: getattr(args, ours)
        for ours, theirs in SCALING[args.rope_type].items()
        if ours not in UNLESS_DEFAULT or getattr(args, ours) != getattr(RopeArgs, ours)
    }
    if with_theta:
        put_path(config, f"{path}.rope_theta" if path else "rope_theta", args.rope_theta)
    if path:
        for key, value in {"rope_type": args.rope_type, **scaling}.items():
            put_path(config, f"{path}.{key}", value)
        return
    config["rope_scaling"] = {"rope_type": args.rope_type, **scaling} if args.rope_type != "default" else None


def read_rope(config, path, theta=10000.0, partial=False):
    """Return our rotary arguments, of `path`, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    theta: the base where config.json has none. partial: whether the layout itself reads partial_rotary_factor.
    """
    nested = "." in path  # rope_scaling replaces rope_parameters in transformers, where that is one object
    places = (path, "rope_scaling") if nested else ("rope_scaling", "rope_parameters")
    found = [(where, value) for where in places if (value := get_path(config, where))]
    where, scaling = found[0] if found else ("rope_scaling", {})
    if not isinstance(scaling, dict):
        raise ModelError(f"config.json has {where}={scaling!r}, and it must be an object or null: correct it")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "dynamic":  # acts on sequences beyond max_position_embeddings only, and no model here has those
        kind = "default"
    if not isinstance(kind, str) or kind not in SCALING:
        raise ModelError(f"config.json scales rotary positions by {kind}: known are {', '.join(SCALING)}, dynamic")
    part = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1) and not partial:
        raise ModelError(f"config.json has partial_rotary_factor={part!r}, and this architecture rotates entire heads")
    hints = typing.get_type_hints(RopeArgs)
    base = {"rope_theta": theta, **_present(config, "rope_theta"), **_present(scaling, "rope_theta")}
    values = {"rope_type": kind, "rope_theta": typed(base["rope_theta"], "rope_theta", float)}
    for ours, theirs in SCALING[kind].items():
        if scaling.get(theirs) is not None:
            values[ours] = typed(scaling[theirs], theirs, hints[ours], "config.json's rope_scaling")
    if kind != "default":
        _complete(values, config)
    if kind == "yarn" and scaling.get("attention_factor") is not None:
        _check_amplitude(values, typed(scaling["attention_factor"], "attention_factor", float))
    return {each.name: each.default for each in fields(RopeArgs)} | values  # not the model's own defaults


def _complete(values, config):
    """Add to `values` what transformers derives from the other sizes."""
    kind, length, longest = values["rope_type"], "original_max_position_embeddings", "max_position_embeddings"
    if "rope_original_max_seq_len" in SCALING[kind]:
        if config.get(length) is not None:  # has precedence, as in transformers
            values["rope_original_max_seq_len"] = typed(config[length], length, int)
        if "rope_original_max_seq_len" not in values:
            values["rope_original_max_seq_len"] = typed(config.get(longest), longest, int)
    if kind == "yarn" and "rope_factor" not in values:
        original = max(1, values["rope_original_max_seq_len"])
        values["rope_factor"] = typed(config.get(longest), longest, int) / original
    elif "rope_factor" not in values:
        raise ModelError(f"config.json scales rotary positions by {kind} without a factor: add it to rope_scaling")


def _check_amplitude(values, given):
    """Hold YaRN's factor on cos and sin against the one that config.json gives; 1 is what two equal mscales give."""
    if given == 1 and "rope_mscale" not in values and "rope_mscale_all_dim" not in values:
        values |= {"rope_mscale": 1.0, "rope_mscale_all_dim": 1.0}
    if values["rope_factor"] < 1:
        return  # refused by the arguments
    own = rope_amplitude(RopeArgs(**{name: value for name, value in values.items() if name != "rope_theta"}))
    if abs(given - own) > 1e-6:
        raise ModelError(f"config.json has attention_factor={given}, and its factor and mscale give {own:.6g}")


def _present(config, key):
    return {} if config.get(key) is None else {key: config[key]}
