"""A decode step as a library: traced by torch.export, compiled by AOTInductor, loaded by any process in milliseconds.

The weights are inputs of the library, so one library serves every checkpoint of an architecture. It has no guards:
what it was traced for is written next to it, and compared before each call.
"""

import builtins
import copy
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

USUAL_LENGTH = 160  # tokens before a typical decode step: the compiler optimizes the loops over keys for it
USUAL_SEQUENCES = 8  # in a batch
LIBRARY = "step.so"
OPERATORS = "step.json"  # the calls of operators that AOTInductor has no C function for; next to the library, same stem
INPUTS = "inputs.json"
OF_MODEL = -1  # the place of a tensor of `state.model`; else the index of its layer


class CannotTrace(Exception):
    """The step cannot be one library: it takes different paths at different lengths, or reads values of tensors."""


def compile_step(model, n_sequences, folder, compiler):
    """Write the decode step of `model`, on the CPU, for (least, most) sequences, to `folder`.

    compiler: the program that compiles C++. Raises `CannotTrace`, and what the compiler raises.
    """
    from torch._inductor import aot_compile  # takes as long to import as torch

    step = _Traced(model, min(max(n_sequences[0], USUAL_SEQUENCES), n_sequences[1]))
    try:
        with _symbolic_len():
            shapes = step.dynamic_shapes(n_sequences)
            exported = torch.export.export(step, step.example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise CannotTrace(f"torch.export fails: {' '.join(str(error).split())[:300]}") from error
    guards = _Guards(exported, step)
    options = {
        "aot_inductor.output_path": str(folder / "build"),
        "cpp.cxx": (None, compiler),
        "compile_threads": 1,
        "size_asserts": False,
        "alignment_asserts": False,
        "cpp.enable_floating_point_contract_flag": "fast",
    }
    with _all_threads():
        library = Path(aot_compile(exported.module(), step.example, options=options))
    guards.check(n_sequences, model.args.max_seq_len)
    library.rename(folder / LIBRARY)
    operators = library.with_suffix(".json")
    if operators.exists():
        operators.rename(folder / OPERATORS)
    (folder / INPUTS).write_text(json.dumps(step.inputs()), encoding="utf-8")
    shutil.rmtree(folder / "build")


@contextmanager
def _symbolic_len():
    """In this context len(tensor) is a symbol, as under torch.compile; Python's own makes it a constant."""
    plain = builtins.len

    def traced_len(x):
        return x.shape[0] if isinstance(x, torch.Tensor) and x.ndim else plain(x)

    builtins.len = traced_len
    try:
        yield
    finally:
        builtins.len = plain


@contextmanager
def _all_threads():
    """In this context the compiler writes loops for the threads that there are when they run, not for those of now."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Traced(torch.nn.Module):
    """The step as a function of tensors alone; ints of the state are sizes of empty ones.

    forward(weights, ids, pos, seen (max_pos + 1, 0), room (max_len, 0), held) -> (logits, hidden | none, replaced ...).
    """

    def __init__(self, model, n_sequences):
        super().__init__()
        longest = model.args.max_seq_len
        if longest < 4:
            raise CannotTrace(f"max_seq_len={longest} leaves no room for a step in the middle of a state")
        n_tokens = min(USUAL_LENGTH, longest // 2)  # a step at the end of its state would be a special case
        max_len = min(2 * USUAL_LENGTH, longest)
        state = _state_behind(model, n_sequences, n_tokens, max_len)
        self.lengths = max_len, max(n_tokens, max_len // 2)
        shorter = _state_behind(model, n_sequences, n_tokens, self.lengths[1])
        self.shorter = {place: tensor.shape for place, tensor in held_tensors(shorter).items()}
        self._not_a_submodule = (model,)
        self.state = state
        self.held = held_tensors(state)
        self.weights = weights_of(model)
        self.found = SimpleNamespace()  # of the traced step: what it replaces, has_hidden (export resets containers)
        self.example = (
            list(self.weights.values()),
            torch.zeros(n_sequences, 1, dtype=torch.long),
            state.pos.clone(),
            _of_size(n_tokens + 1),
            _of_size(state.max_len),
            [tensor.contiguous() for tensor in self.held.values()],
        )

    def forward(self, weights, ids, pos, seen, room, held):
        (model,) = self._not_a_submodule
        state = copy.copy(self.state)
        state.pos = pos
        state.max_pos = seen.shape[0] - 1
        state.max_len = room.shape[0]
        state.layers = [{} for _ in self.state.layers]
        state.model = {}
        state.hidden = None
        before = dict(zip(self.held, held))
        for (place, name), tensor in before.items():
            _dict_at(state, place)[name] = tensor
        logits = torch.func.functional_call(model, dict(zip(self.weights, weights)), (ids,), {"state": state})[0]
        after = held_tensors(state)
        if after.keys() != before.keys():
            raise CannotTrace("a decode step adds tensors to the state")
        replaced = [place for place, tensor in after.items() if tensor is not before[place]]
        self.found.replaced = replaced
        self.found.has_hidden = state.hidden is not None
        hidden = () if state.hidden is None else (state.hidden,)
        return (logits, *hidden, *(after[place].clone(memory_format=torch.contiguous_format) for place in replaced))

    def dims(self, place):
        """Return the role of each dim of a tensor of the state, see `size_of`."""
        sizes = zip(self.held[place].shape[1:], self.shorter[place][1:], strict=True)
        return ["sequences", *(_role(pair, self.lengths) for pair in sizes)]

    def dynamic_shapes(self, n_sequences):
        least, most = n_sequences
        dynamic, static = torch.export.Dim.DYNAMIC, torch.export.Dim.STATIC
        sequences = static if least == most else dynamic(min=least, max=most)
        held = [
            (sequences, *(static if isinstance(role, int) else dynamic for role in self.dims(place)[1:]))
            for place in self.held
        ]
        return [None] * len(self.weights), (sequences, static), (sequences,), (dynamic, static), (dynamic, static), held

    def inputs(self):
        """Return the description of the inputs that `CompiledStep` compares with."""
        return {
            "weights": [(name, str(w.dtype), list(w.shape)) for name, w in self.weights.items()],
            "held": [(*place, str(tensor.dtype), self.dims(place)) for place, tensor in self.held.items()],
            "replaced": self.found.replaced,
            "has_hidden": self.found.has_hidden,
        }


def _role(sizes, lengths):
    """Return the role of a dim of these two sizes in states of these two lengths."""
    if sizes[0] == sizes[1]:
        return sizes[0]
    roles = {f"length / {n}{more}": n for more in ("", " + 1", " + 2") for n in range(1, lengths[0] + 1)}
    fitting = [r for r in roles if sizes == tuple(size_of(r, {"length": length}) for length in lengths)]
    powers = [r for r in fitting if roles[r] & (roles[r] - 1) == 0]  # where more than one fits, the usual kind
    return (powers or fitting or sizes)[0]


def size_of(role, case):
    """Return the size of a dim in a case {"sequences": ..., "length": ..., ...}.

    role: a name in the case, "length / n", a slot per n tokens, "length / n + 2", two slots more, or a size that is the
    same in every case.
    """
    if isinstance(role, int):
        return role
    name, _, slots = role.partition(" / ")
    n, _, more = slots.partition(" + ")
    return -(-case[name] // int(n or 1)) + int(more or 0)


class _Guards:
    """What the tracer and the compiler assumed of the sizes: it must hold for all that the library is used for."""

    def __init__(self, exported, step):
        """Find the symbol of each dynamic dimension."""
        inputs = [node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")][len(step.weights) :]
        roles = [("sequences", 1), ("sequences",), ("seen", 0), ("length", 0), *map(step.dims, step.held)]
        self.roles = {}
        self.env = None
        for tensor, sizes in zip(inputs, roles, strict=True):
            for size, role in zip(tensor.shape, sizes, strict=True):
                if isinstance(size, torch.SymInt):
                    self.env = size.node.shape_env
                    self.roles[size.node._expr] = role

    def check(self, n_sequences, longest):
        """Raise `CannotTrace` where a guard fails for some number of sequences and some length up to `longest`."""
        for guard in {guard.expr for guard in self.env.guards}:
            symbols = sorted(guard.free_symbols & self.roles.keys(), key=str)
            cases = _cases(n_sequences, longest)
            for sizes in {tuple(size_of(self.roles[s], case) for s in symbols) for case in cases}:
                if guard.subs(dict(zip(symbols, sizes))) == False:  # noqa: E712 (of sympy)
                    about = ", ".join(f"{self.roles[s]} {size}" for s, size in zip(symbols, sizes))
                    raise CannotTrace(f"it takes another path for {about}: {guard}")


def _cases(n_sequences, longest):
    """Return the sizes that the library is used for, some of all."""
    return [
        {"sequences": sequences, "length": length, "seen": max_pos + 1}
        for sequences in {n_sequences[0], sum(n_sequences) // 2, n_sequences[1]}
        for length in {min(4, longest), min(256, longest), longest}
        for max_pos in _positions(length)
    ]


def _positions(length):
    """Return some of 1 ... length - 2: all up to 40, the powers of two with their neighbours, the last."""
    powers = {2**n + offset for n in range(5, length.bit_length()) for offset in (-1, 0, 1)}
    return [p for p in {*range(1, 40), *powers, length - 2} if 0 < p < length - 1]


class CompiledStep:
    """A library of `compile_step`, with the weights of a model."""

    def __init__(self, model, folder):
        """Raises `CannotTrace` where the weights are not those that the library was made for."""
        about = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
        weights = weights_of(model)
        if [[name, str(w.dtype), list(w.shape)] for name, w in weights.items()] != about["weights"]:
            raise CannotTrace("the model has other weights than the one that it was compiled from")
        self.weights = list(weights.values())
        self.held = {(place, name): (dtype, sizes) for place, name, dtype, sizes in about["held"]}
        self.replaced = [tuple(place) for place in about["replaced"]]
        self.has_hidden = about["has_hidden"]
        self.shapes = None  # those of the last call, which fitted
        self.library = torch._C._aoti.AOTIModelContainerRunnerCpu(str(folder / LIBRARY), 1)

    def __call__(self, ids, state):
        """Return the logits (B, 1, V) of one token per sequence; None where the state is not as in the traced step."""
        if state.max_pos + 1 >= state.max_len:  # the library assumes room behind the token
            return None
        tensors = held_tensors(state)
        shapes = [tensor.shape for tensor in tensors.values()]
        if shapes != self.shapes:
            if not self._fits(tensors, len(ids), state.max_len):
                return None
            self.shapes = shapes
        for (place, name), tensor in tensors.items():
            if not tensor.is_contiguous():
                tensors[place, name] = _dict_at(state, place)[name] = tensor.contiguous()
        sizes = _of_size(state.max_pos + 1), _of_size(state.max_len)
        logits, *new = self.library.run([*self.weights, ids.contiguous(), state.pos, *sizes, *tensors.values()])
        state.hidden = new.pop(0) if self.has_hidden else None
        for (place, name), tensor in zip(self.replaced, new, strict=True):
            _dict_at(state, place)[name] = tensor
        return logits

    def _fits(self, tensors, sequences, length):
        if tensors.keys() != self.held.keys():
            return False
        case = {"sequences": sequences, "length": length}
        return all(
            str(tensor.dtype) == dtype and list(tensor.shape) == [size_of(role, case) for role in roles]
            for tensor, (dtype, roles) in zip(tensors.values(), self.held.values())
        )


def _state_behind(model, n_sequences, n_tokens, max_len):
    """Return the state of `n_sequences` sequences that have read `n_tokens`."""
    state = model.init_state(n_sequences, max_len)
    state.last_only = True
    model(torch.zeros(n_sequences, n_tokens, dtype=torch.long), state=state)
    state.advance(n_tokens)
    return state


def held_tensors(state):
    """Return {(layer | OF_MODEL, name): tensor} of a state, in one order."""
    places = [*enumerate(state.layers), (OF_MODEL, state.model)]
    return {(place, name): held[name] for place, held in places for name in sorted(held)}


def weights_of(model):
    """Return {name: tensor} of the parameters and buffers of a model."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _dict_at(state, place):
    return state.model if place == OF_MODEL else state.layers[place]


def _of_size(n):
    return torch.empty(n, 0, dtype=torch.uint8)
