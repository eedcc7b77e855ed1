"""How published checkpoints write an architecture: names, tensors and config, for export and import.

`hf_layout` of a model is its `Layout`; `to_hf` and `from_hf` of BaseModel apply it. docs/interchange.md shows how.
"""

import copy
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from model.hf.config_keys import UNREADABLE, Key, get_path, put_path, read_rope, typed, write_rope
from model.hf.tensors import Piece
from model.layers.rotary import RopeArgs
from utils.errors import ModelError


@dataclass(frozen=True)
class Layout:
    """One architecture as transformers publishes it. `fields` and `names` are needed; the rest is for what differs.

    Patterns are regular expressions in which a dot is literal. A key may be a path, "rope_parameters.main.rope_theta".

    Tensors, from ours to theirs in this order, and back:
        stored(args)   {end of our name: one of Rows, Transposed, Shape, MinusOne of tensors.py, or a tuple of them}
        joined(args)   {end of their name: Join}: those of ours that `names` gives this name are one tensor there
        names(args)    {pattern: text}, applied in order to each of our names. In the result `*` is the index of dim 0,
                       whose slices are written one by one, and `{q,k,v}` names equal parts of dim 0
        copies(args)   {a further name of theirs: the one that it repeats}
    Import alone:
        aliases        {pattern of other names that checkpoints have: the text that makes them ours of `names`}
        ignored        patterns of published tensors that are left out, which the import counts
        present(config, tensors): the config that describes what the checkpoint, {name: tensor}, holds
    config.json:
        fields         {our argument: its key, or a `Key` with several places or with conversions}
        only_ours      arguments of the training, written under our own name
        fixed          {key: the one value that this architecture has}
        absent         {key: its default where config.json lacks it, a value or a function of the config}
        rope           path of the object with the arguments of RopeArgs; "": rope_theta and rope_scaling
        more(args)     {further key: value}, and ModelError for sizes that transformers refuses
        known_as       further architectures and model types that are read
        holds(args)    of several in a `Variants`: whether this one is for these arguments
        canonical(config): the same in the keys of this table, where published configs have others
    """

    args: type  # our dataclass
    architecture: str  # the class in transformers, config.json's `architectures`
    model_type: str
    fields: dict[str, str | Key]
    names: Callable
    only_ours: tuple = ()
    fixed: dict = field(default_factory=dict)
    absent: dict = field(default_factory=dict)
    rope: str = ""
    more: Callable = lambda args: {}
    known_as: tuple = ()
    holds: Callable = lambda args: True
    canonical: Callable = lambda config: config
    stored: Callable = lambda args: {}
    joined: Callable = lambda args: {}
    copies: Callable = lambda args: {}
    aliases: dict[str, str] = field(default_factory=dict)
    ignored: tuple = ("rotary_emb.inv_freq$",)  # a table that we compute
    present: Callable = lambda config, tensors: config
    vocab_rows: tuple = ("tok_embed.weight", "lm_head.weight")  # ends of our names: a row for every token id

    def for_args(self, args):
        """Return the Layout for our arguments; `Variants` has several."""
        return self

    def for_config(self, config):
        """Return the Layout for a config.json."""
        return self

    def reads(self, config):
        """Return whether a config.json is of this architecture."""
        names = config.get("architectures")
        names = names if isinstance(names, list) else [names]
        known = {self.architecture, *self.known_as}
        return any(name in known for name in names) or config.get("model_type") in {self.model_type, *self.known_as}

    # ---------------------------------------------------------------- config.json

    def config(self, args):
        """Return the dict that config.json holds."""
        config = {"architectures": [self.architecture], "model_type": self.model_type, "torch_dtype": "float32"}
        for path, value in self.fixed.items():
            put_path(config, path, copy.deepcopy(value))
        for ours, key in self._keys().items():
            for path in key.paths:
                put_path(config, path, key.write(getattr(args, ours), args))
        if isinstance(args, RopeArgs):
            write_rope(config, args, self.rope, with_theta="rope_theta" not in self.fields)
        config |= {name: getattr(args, name) for name in self.only_ours}
        for path, value in self.more(args).items():
            put_path(config, path, value)
        return config

    def model_args(self, config, tensors=None):
        """Return our arguments for a config.json; `ModelError` names what this architecture does not support.

        tensors: {name: tensor} of the checkpoint, where it is there, so that the result describes what it holds.
        """
        config = self.in_our_keys(config, tensors)
        if config.get("quantization_config"):
            raise ModelError("the checkpoint's weights are quantised: convert them to bf16 or fp32 first")
        for path, value in self.fixed.items():
            if _has(config, path) and get_path(config, path) != value:
                found = get_path(config, path)
                raise ModelError(f"config.json has {path}={found}, and our {self.architecture} supports {value} only")
        kinds = typing.get_type_hints(self.args)
        values = self._read_rope(config) if issubclass(self.args, RopeArgs) else {}
        for ours, key in {**self._keys(), **{name: Key(name) for name in self.only_ours}}.items():
            value, path = key.get(config)
            if value is not None:
                values[ours] = typed(value, path, kinds[ours])
            elif ours not in self.only_ours and path not in self.absent:
                raise ModelError(f"config.json has no {path}: it is not a complete {self.architecture}")
        for ours, key in self._keys().items():
            if ours not in values:
                value = self.absent[key.paths[0]]
                values[ours] = self._of(value, config) if callable(value) else value
        return self.args(**values)

    def in_our_keys(self, config, tensors=None):
        """Return a config.json in the keys of this table; with the tensors of a checkpoint, of what that holds."""
        config = self._of(self.canonical, config)
        return config if tensors is None else self._of(self.present, config, tensors)

    def _of(self, function, config, *further):
        """The result of a function of the table; ModelError where the config has another type than it expects."""
        try:
            return function(config, *further)
        except UNREADABLE as error:
            raise ModelError(
                f"config.json is not that of a {self.architecture} ({type(error).__name__}: {error}): correct it"
            ) from None

    def _keys(self):
        return {ours: key if isinstance(key, Key) else Key(key) for ours, key in self.fields.items()}

    def _read_rope(self, config):
        """Our rotary arguments, but the base where `fields` has it."""
        partial = any(path.endswith("partial_rotary_factor") for key in self._keys().values() for path in key.paths)
        values = read_rope(config, self.rope, self.absent.get("rope_theta", 10000.0), partial)
        return {name: value for name, value in values.items() if name not in self.fields}

    # ---------------------------------------------------------------- tensors

    def tensors(self, model):
        """Return {published name: tensor} of all weights, tied ones once, as copies on the CPU.

        fp32, and integers as they are. Of a model on the meta device: names and shapes only.
        """
        tensors, seen = {}, set()
        for piece in self.pieces(model):
            if id(piece.targets[0]) in seen:
                continue
            seen |= {id(target) for target in piece.targets}
            new = piece.write([_to_cpu(target) for target in piece.targets])
            if new.keys() & tensors.keys():
                raise ModelError(
                    f"{piece.ours[0]} and another tensor both become {piece.theirs}: correct the names of the hf_layout"
                )
            tensors |= {name: part.clone(memory_format=torch.contiguous_format) for name, part in new.items()}
        return tensors | {theirs: tensors[first].clone() for theirs, first in self.copies(model.args).items()}

    @torch.no_grad()
    def load(self, model, tensors):
        """Copy {published name: tensor} into `model`; `ModelError` when one is missing, misshapen or left over."""
        unread, filled = set(tensors), set()
        for piece in self.pieces(model):
            tied = id(piece.targets[0]) in filled
            if tied and not any(name in tensors for name in piece.names()):
                continue
            filled |= {id(target) for target in piece.targets}
            sources = [_take(tensors, unread, *each, piece.targets[0]) for each in piece.shapes().items()]
            for source, target in zip(piece.read(sources), piece.targets, strict=True):
                if tied and not torch.equal(source.to(target.device), target):
                    raise ModelError(f"{piece.theirs} differs from the weights that config.json ties it to")
                target.copy_(source)
        for theirs, first in self.copies(model.args).items():
            if theirs in tensors and not torch.equal(tensors[theirs], tensors[first]):
                raise ModelError(f"{theirs} differs from {first}, which it should repeat")
            unread.discard(theirs)
        left = sorted(unread - set(self.left_out(unread)))
        if left:
            raise ModelError(f"{left[0]} and {len(left) - 1} more tensors do not belong to this {self.architecture}")

    def pieces(self, model):
        """Return the list of `Piece` that the tensors of a model are written as."""
        stored, joined, names = self.stored(model.args), self.joined(model.args), self.names(model.args)
        pieces = {}
        for ours, tensor in model.state_dict(keep_vars=True).items():  # keep_vars: a tied one is the same object
            theirs = _renamed(ours, names)
            join = next((join for end, join in joined.items() if theirs.endswith(end)), None)
            steps = next((steps for end, steps in stored.items() if ours.endswith(end)), ())
            piece = Piece(theirs, [], [], [], join)
            if join is not None:
                piece = pieces.setdefault(theirs, piece)
            else:
                pieces[ours] = piece
            piece.ours.append(ours)
            piece.targets.append(tensor)
            piece.steps.append(steps if isinstance(steps, tuple) else (steps,))
        for piece in pieces.values():
            piece.arrange()
        return list(pieces.values())

    def checkpoint(self, tensors):
        """Return the mapping {name: tensor} of a checkpoint with the names of this table."""
        names = {_renamed(name, self.aliases): name for name in tensors}
        if len(names) < len(tensors):
            twice = next(name for name in tensors if names[_renamed(name, self.aliases)] != name)
            raise ModelError(f"the checkpoint has {twice} under two names: remove one")
        return tensors if all(new == old for new, old in names.items()) else Renamed(tensors, names)

    def left_out(self, names):
        """Return those of the published names that are ignored."""
        return [name for name in names if any(re.search(_pattern(each), name) for each in self.ignored)]

    def vocab_names(self, model):
        """Return the published names of the tensors that have a row for every token id."""
        first = {
            name for piece in self.pieces(model) if piece.ours[0].endswith(self.vocab_rows) for name in piece.names()
        }
        return first | {theirs for theirs, repeated in self.copies(model.args).items() if repeated in first}


class Variants:
    """An architecture that is published as several classes, such as one without experts and one with: a Layout each.

    Export takes the first that holds the arguments, import the first that reads the config.
    """

    def __init__(self, *layouts):
        self.layouts = layouts
        self.architecture = ", ".join(layout.architecture for layout in layouts)

    def for_args(self, args):
        for layout in self.layouts:
            if layout.holds(args):
                return layout
        raise ModelError(f"no published class of {self.architecture} has these arguments: change them")

    def for_config(self, config):
        return next((layout for layout in self.layouts if layout.reads(config)), self.layouts[0])

    def reads(self, config):
        return any(layout.reads(config) for layout in self.layouts)


class Renamed(Mapping):
    """The same tensors under other names. names: {new: old}."""

    def __init__(self, tensors, names):
        self._tensors = tensors
        self._names = names

    def __getitem__(self, name):
        return self._tensors[self._names[name]]

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


def to_hf(model):
    """Return `(config, tensors)`: the content of config.json and {published name: tensor}, fp32 copies on the CPU.

    Raises `ModelError` for an architecture without an `hf_layout`, or one that transformers cannot hold.
    """
    layout = layout_of(type(model)).for_args(model.args)
    return layout.config(model.args), layout.tensors(model)


def from_hf(Model, config, tensors, max_seq_len=0):
    """Return a `Model` built from a published config and {name: tensor}, a mapping that may read lazily.

    max_seq_len above 0 shortens the tables of positions and nothing else. Raises `ModelError` that names what the
    architecture does not support, or the tensor that is missing or left over.
    """
    layout = layout_of(Model).for_config(config)
    tensors = layout.checkpoint(tensors)
    args = layout.model_args(config, tensors)
    model = Model(replace(args, max_seq_len=min(max_seq_len, args.max_seq_len)) if max_seq_len else args)
    layout.load(model, tensors)
    return model


def layout_of(Model):
    """Return the `Layout` or `Variants` of an architecture; ModelError where it has none."""
    if Model.hf_layout is None:
        raise ModelError(
            f"{Model.model_name} has no published layout, so transformers cannot hold it: give {Model.__name__} an "
            "hf_layout (docs/interchange.md)"
        )
    return Model.hf_layout


def _renamed(name, patterns):
    for pattern, text in patterns.items():
        name = re.sub(_pattern(pattern), text, name)
    return name


def _pattern(text):
    return text.replace(".", r"\.")


def _has(config, path):
    outer, _, last = path.rpartition(".")
    inner = get_path(config, outer) if outer else config
    return isinstance(inner, dict) and last in inner


def _to_cpu(tensor):
    device = "meta" if tensor.is_meta else "cpu"
    return tensor.detach().to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)


def _take(tensors, unread, name, shape, target):
    """The published tensor `name` in the type of `target`; ModelError unless it is there and as expected."""
    if name not in tensors:
        raise ModelError(f"the checkpoint lacks {name}")
    unread.discard(name)
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise ModelError(f"{name} is {tuple(tensor.shape)}, and config.json makes it {shape}")
    if tensor.is_floating_point() != target.is_floating_point():
        wanted = "floating-point numbers" if target.is_floating_point() else "integers"
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(f"{name} is of {kind}, and this architecture has {wanted} there: convert it")
    return tensor.to(target.dtype)
