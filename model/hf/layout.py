"""How published checkpoints write an architecture: names, config and row order, for export and import.

`hf_layout` of a model is its `Layout`; `to_hf` and `from_hf` of BaseModel apply it. docs/interchange.md shows how.
"""

import math
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

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
    },
}
TYPES = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Layout:
    """One architecture as transformers publishes it.

    names(args): {pattern: text}, applied to each of our names in order, where a dot is literal; `*` in the result is
    the index of dim 0, and the slices are written one by one. rows(args): {end of our name: the order of the
    rows in their tensor}. copies(args): {a further name of theirs: the one it repeats}. more(args): {further key of
    config.json: value}, and ModelError for sizes that transformers refuses. present(config, names of tensors): the
    config that describes what the checkpoint holds.
    """

    args: type  # our dataclass
    architecture: str  # the class in transformers, config.json's `architectures`
    model_type: str
    fields: dict[str, str]  # our argument: key in config.json
    names: Callable
    only_ours: tuple = ()  # arguments of the training, written under our own name
    fixed: dict = field(default_factory=dict)  # key: the one value that this architecture has
    absent: dict = field(
        default_factory=dict
    )  # key: its default where config.json lacks it, a value or a function of the config
    rows: Callable = lambda args: {}
    copies: Callable = lambda args: {}
    more: Callable = lambda args: {}
    present: Callable = lambda config, tensors: config

    def reads(self, config):
        """Return whether a config.json is of this architecture."""
        names = config.get("architectures")
        names = names if isinstance(names, list) else [names]
        return self.architecture in names or config.get("model_type") == self.model_type

    # ---------------------------------------------------------------- config.json

    def config(self, args):
        """Return the dict that config.json holds."""
        config = {"architectures": [self.architecture], "model_type": self.model_type, "torch_dtype": "float32"}
        config |= self.fixed
        config |= {theirs: getattr(args, ours) for ours, theirs in self.fields.items()}
        if isinstance(args, RopeArgs):
            scaling = {theirs: getattr(args, ours) for ours, theirs in SCALING[args.rope_type].items()}
            config |= {"rope_theta": args.rope_theta, "rope_scaling": {"rope_type": args.rope_type, **scaling}}
            if args.rope_type == "default":
                config["rope_scaling"] = None
        return config | {name: getattr(args, name) for name in self.only_ours} | self.more(args)

    def model_args(self, config):
        """Return our arguments for a config.json; `ModelError` names what this architecture does not support."""
        if config.get("quantization_config"):
            raise ModelError("the checkpoint's weights are quantised: convert them to bf16 or fp32 first")
        for key, value in self.fixed.items():
            if key in config and config[key] != value:
                raise ModelError(
                    f"config.json has {key}={config[key]}, and our {self.architecture} supports {value} only"
                )
        kinds = typing.get_type_hints(self.args)
        values = {}
        for ours, theirs in {**self.fields, **{name: name for name in self.only_ours}}.items():
            if config.get(theirs) is not None:
                values[ours] = _typed(config, theirs, kinds[ours])
            elif theirs not in self.absent and ours not in self.only_ours:
                raise ModelError(f"config.json has no {theirs}: it is not a complete {self.architecture}")
        for ours, theirs in self.fields.items():
            if ours not in values:
                value = self.absent[theirs]
                values[ours] = value(config) if callable(value) else value
        if issubclass(self.args, RopeArgs):
            values |= _read_rope(config)
        return self.args(**values)

    # ---------------------------------------------------------------- tensors

    def tensors(self, model):
        """Return {published name: tensor} of all weights, tied ones once, as fp32 copies on the CPU."""
        args, tensors, seen = model.args, {}, set()
        for ours, tensor in model.state_dict().items():
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            theirs, order = self._place(ours, args)
            tensor = tensor.detach().to("cpu", torch.float32)
            tensor = tensor if order is None else tensor[order]
            if "*" in theirs:
                new = {theirs.replace("*", str(e)): part.clone() for e, part in enumerate(tensor)}
            else:
                new = {theirs: tensor.clone()}
            if new.keys() & tensors.keys():
                raise ModelError(f"{ours} and another tensor both become {theirs}: correct the names of the hf_layout")
            tensors |= new
        return tensors | {theirs: tensors[first].clone() for theirs, first in self.copies(args).items()}

    @torch.no_grad()
    def load(self, model, tensors):
        """Copy {published name: tensor} into `model`; `ModelError` when one is missing, misshapen or left over."""
        unread, filled = set(tensors), set()
        for ours, target in model.state_dict().items():
            theirs, order = self._place(ours, model.args)
            tied = target.data_ptr() in filled
            if tied and theirs not in tensors:
                continue
            filled.add(target.data_ptr())
            names = [theirs.replace("*", str(e)) for e in range(len(target))] if "*" in theirs else [theirs]
            source = [_take(tensors, unread, name) for name in names]
            source = torch.stack(source) if "*" in theirs else source[0]
            if source.shape != target.shape:
                raise ModelError(f"{theirs} is {tuple(source.shape)}, and config.json makes it {tuple(target.shape)}")
            source = source.to(target.dtype)
            source = source if order is None else source[order.argsort()]
            if tied and not torch.equal(source.to(target.device), target):
                raise ModelError(f"{theirs} differs from the weights that config.json ties it to")
            target.copy_(source)
        for theirs, first in self.copies(model.args).items():
            if theirs in tensors and not torch.equal(_take(tensors, unread, theirs), tensors[first]):
                raise ModelError(f"{theirs} differs from {first}, which it should repeat")
        left = sorted(name for name in unread if not name.endswith("rotary_emb.inv_freq"))  # a table that we compute
        if left:
            raise ModelError(f"{left[0]} and {len(left) - 1} more tensors do not belong to this {self.architecture}")

    def vocab_names(self, config):
        """Return the published names of the tensors that have a row for every token id."""
        args = self.model_args(config)
        first = {self._place(ours, args)[0] for ours in ("tok_embed.weight", "lm_head.weight")}
        return first | {theirs for theirs, repeated in self.copies(args).items() if repeated in first}

    def _place(self, ours, args):
        """The published name of a tensor of ours and the order of its rows (None: unchanged)."""
        theirs = ours
        for pattern, text in self.names(args).items():
            theirs = re.sub(pattern.replace(".", r"\."), text, theirs)
        return theirs, next((order for end, order in self.rows(args).items() if ours.endswith(end)), None)


def to_hf(model):
    """Return `(config, tensors)`: the content of config.json and {published name: tensor}, fp32 copies on the CPU.

    Raises `ModelError` for an architecture without an `hf_layout`, or one that transformers cannot hold.
    """
    layout = layout_of(type(model))
    return layout.config(model.args), layout.tensors(model)


def from_hf(Model, config, tensors, max_seq_len=0):
    """Return a `Model` built from a published config and {name: tensor}, a mapping that may read lazily.

    max_seq_len above 0 shortens the tables of positions and nothing else. Raises `ModelError` that names what the
    architecture does not support, or the tensor that is missing or left over.
    """
    layout = layout_of(Model)
    args = layout.model_args(layout.present(config, tensors))
    model = Model(replace(args, max_seq_len=min(max_seq_len, args.max_seq_len)) if max_seq_len else args)
    layout.load(model, tensors)
    return model


def layout_of(Model):
    """Return the `hf_layout` of an architecture; ModelError where it has none."""
    if Model.hf_layout is None:
        raise ModelError(
            f"{Model.model_name} has no published layout, so transformers cannot hold it: give {Model.__name__} an "
            "hf_layout (docs/interchange.md)"
        )
    return Model.hf_layout


def interleaved_rows(n_heads, n_plain, n_rotary):
    """Return the row order of a projection whose rotary pairs are neighbours: theirs = ours[order].

    Each head has `n_plain` rows without positions, then `n_rotary` rows with. A score is a sum over pairs, so the same
    reordering of the rows of q and k does not change it. We and transformers' Llama rotate halves, (x[j], x[j + K/2]),
    whose slices are contiguous. DeepSeek, and Meta's own files of Llama, rotate neighbours, (x[2j], x[2j + 1]). Import
    and export reorder the rows once; no forward depends on the layout.
    """
    plain = torch.arange(n_plain)
    rotary = n_plain + torch.arange(n_rotary).view(2, -1).T.flatten()  # 0, K/2, 1, K/2 + 1, ...
    head = torch.cat((plain, rotary))
    return (torch.arange(n_heads)[:, None] * len(head) + head).flatten()


def _take(tensors, unread, name):
    if name not in tensors:
        raise ModelError(f"the checkpoint lacks {name}")
    unread.discard(name)
    return tensors[name]


def _typed(config, key, kind, where="config.json"):
    """The value of `key`; `ModelError` unless it is of the type `kind` (an int may stand for a float)."""
    value = config[key]
    if kind is float and type(value) is int:
        value = float(value)
    if kind in TYPES and (type(value) is not kind or (kind is float and not math.isfinite(value))):
        raise ModelError(f"{where} has {key}={value!r}, and it must be {TYPES[kind]}: correct it")
    return value


def _read_rope(config):
    """Our rotary arguments for a config.json, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"config.json has rope_scaling={scaling!r}, and it must be an object or null: correct it")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "dynamic":  # acts on sequences beyond max_position_embeddings only, and no model here has those
        kind = "default"
    if not isinstance(kind, str) or kind not in SCALING:
        raise ModelError(f"config.json scales rotary positions by {kind}: known are {', '.join(SCALING)}, dynamic")
    part = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1) or not scaling.get("truncate", True):
        raise ModelError("config.json has rotary positions of another kind (partial_rotary_factor or truncate)")
    hints = typing.get_type_hints(RopeArgs)
    theta = {"rope_theta": 10000.0, **_present(config, "rope_theta"), **_present(scaling, "rope_theta")}
    values = {"rope_type": kind, "rope_theta": _typed(theta, "rope_theta", float)}
    for ours, theirs in SCALING[kind].items():
        if scaling.get(theirs) is not None:
            values[ours] = _typed(scaling, theirs, hints[ours], "config.json's rope_scaling")
    if kind == "default":
        return values
    if "rope_original_max_seq_len" in SCALING[kind]:
        length = "original_max_position_embeddings"
        if config.get(length) is not None:  # has precedence, as in transformers
            values["rope_original_max_seq_len"] = _typed(config, length, int)
        values.setdefault("rope_original_max_seq_len", config["max_position_embeddings"])
    if kind == "yarn":
        values.setdefault("rope_factor", config["max_position_embeddings"] / values["rope_original_max_seq_len"])
    elif "rope_factor" not in values:
        raise ModelError(f"config.json scales rotary positions by {kind} without a factor: add it to rope_scaling")
    if kind == "yarn" and scaling.get("attention_factor") is not None:
        given = _typed(scaling, "attention_factor", float, "config.json's rope_scaling")
        own = rope_amplitude(RopeArgs(**{name: value for name, value in values.items() if name != "rope_theta"}))
        if abs(given - own) > 1e-6:
            raise ModelError(f"config.json has attention_factor={given}, and its factor and mscale give {own:.6g}")
    return values


def _present(config, key):
    return {} if config.get(key) is None else {key: config[key]}
