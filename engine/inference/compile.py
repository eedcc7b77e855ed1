"""Decoding compiled: the forward of one token a row as one program, and on a processor the products of our kernels."""

import copy

import torch
from torch import nn

from model.kernels import decode
from model.kernels.int8 import Int8Linear
from model.kernels.matmul import FEW_ROWS as SMALL
from model.layers import SwiGLU
from utils.log import warn


@torch.inference_mode()
def compile_decoding(model, rows=1):
    """From now on, whoever reads tokens through a state (engine/inference/batch.py) takes `model.reader`, a function of ids (B, T)
    and state that returns logits: for one token a row behind others it runs a compiled forward.

    A model without a state, which reads its whole text for every token, is left alone, with a word. The programs are
    made here: one for a single row at any position, and for up to `rows` side by side one for any number, beyond 16
    another. The weights must not change any more: on a processor there is a copy of them, packed for the kernels
    (model/kernels/decode.py). Raises ModelError where there is no C++ compiler.
    """
    if not model.accepts("state"):
        warn("--compile does nothing here: this model keeps no state, so it has no step of one token to compile")
        return

    from torch._inductor import config as inductor  # takes as long to import as torch

    on_cpu = next(model.parameters()).device.type == "cpu"
    program = with_kernels(model) if on_cpu else model

    def forward(ids, state):
        return program(ids, state=state)[0]

    options, frozen = {}, {}
    if on_cpu:
        # The weights become constants of the program. Nobody else holds it, so nobody changes its modules: not to look
        # for that in every step saves a tenth of it. But then the programs of two models must not be taken for each
        # other: they are kept by the code.
        forward.__code__ = forward.__code__.replace()
        frozen = {"freezing": True}
        options = {
            **frozen,
            "size_asserts": False,
            "alignment_asserts": False,
            "cpp.enable_floating_point_contract_flag": "fast",
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        }
    step = torch.compile(forward, options=options)

    def reader(ids, state):
        return (step if state.max_pos > 0 and ids.shape[1] == 1 else forward)(ids, state)

    with inductor.patch(frozen):  # as an option it reaches the compiler alone, not who hands it the weights
        for count in sorted({1, min(rows, SMALL), rows}):  # small_matmul asks whether they are few
            _write(model, step, count)
    model.reader = reader


USUAL = 160  # tokens behind which a step usually stands: the compiler lays out the loops over them by it


def _write(model, step, rows):
    """Make the program for one row, or the one for any larger number, by taking a step: at any position, in a state of
    any length. What varies is said beforehand: the compiler would find it out by making one program after another."""
    longest = model.args.max_seq_len
    tokens = min(USUAL, longest // 2)  # at the end of its state a step would be a special case
    state = model.init_state(rows, min(2 * USUAL, longest))
    state.last_only = True
    model(torch.zeros(rows, tokens, dtype=torch.long, device=state.pos.device), state=state)
    state.advance(tokens)
    ids = torch.zeros(rows, 1, dtype=torch.long, device=state.pos.device)
    for tensor in (ids, state.pos, *(tensor for layer in state.layers for tensor in layer.values())):
        if rows > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    for layer in state.layers:
        for name in layer.keys() & state.token_indexed:
            torch._dynamo.maybe_mark_dynamic(layer[name], 1)
    with torch.compiler.config.patch(dynamic_sources="L['state'].max_pos,L['state'].max_len"):
        step(ids, state)


def with_kernels(model):
    """A second view of a model on the same weights, in which products are those of model/kernels/decode.py: those of every
    plain Linear, SwiGLU and stack of experts whose type they take."""
    decode.load()
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    program = copy.deepcopy(model, shared)
    packed = {}  # a weight that two modules share is packed once

    def pack(weight):
        if id(weight) not in packed:
            packed[id(weight)] = decode.Packed.of(weight)
        return packed[id(weight)]

    def held(linear):
        return linear.int8 if type(linear) is Int8Linear else linear.weight

    def packed_alike(weights):
        """All of them packed, or None where one of them cannot be, or not as the others."""
        parts = [pack(weight) for weight in weights]
        return None if None in parts or len({part.weight.dtype for part in parts}) > 1 else parts

    for module in list(program.modules()):
        names = getattr(module, "expert_weights", ())
        for name, stack in zip(names, packed_alike([getattr(module, name) for name in names]) or ()):
            delattr(module, name)
            setattr(module, name, stack)
        for name, child in list(module.named_children()):
            if _is_plain(child, SwiGLU) and all(_is_plain(linear, *LINEARS) for linear in child.children()):
                linears = child.gate_proj, child.up_proj, child.down_proj
                parts = packed_alike([held(linear) for linear in linears if linear.bias is None])
                if parts and len(parts) == 3:
                    setattr(module, name, decode.PackedSwiGLU(child, parts))
            elif _is_plain(child, *LINEARS) and pack(held(child)) is not None:
                setattr(module, name, decode.PackedLinear(child, pack(held(child))))
    return program


LINEARS = nn.Linear, Int8Linear


def _is_plain(module, *classes):
    """Whether a module does what its class says: a subclass or a hook may do anything."""
    return type(module) in classes and not module._forward_hooks and not module._forward_pre_hooks
