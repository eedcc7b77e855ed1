"""The faster forms of a full model for decoding: int8 weights, a compiled decode step, and packed weights on a CPU.

A decode step is a forward of one token per sequence, after others. It is compiled once for a single sequence and once
for any larger number (once more beyond 16), at any position.
"""

import copy
from contextlib import contextmanager

import torch

from model.kernels import decode
from model.kernels.int8 import to_int8
from model.kernels.matmul import FEW_ROWS
from model.kernels.packed import Packer
from utils.errors import ModelError

USUAL_LENGTH = 160  # tokens before a typical decode step: the compiler optimizes the loops over keys for it


def prepare_for_decoding(model, precision="fp32", compile=False, slots=1):
    """Return `decode_step(ids, state) -> logits`, the forward (B, T) -> (B, 1|T, V) that inference is to call.

    precision: fp32, bf16, fp16 or int8. The weights already have it; for int8 they are in bf16, and the matrices among
    them are quantized here, in place. compile: compile the decode step for up to `slots` sequences; the weights must
    not change afterwards. A model without a state prefills the full text for every token, so it has no step to compile.
    Raises `ModelError` without a C++ compiler, and where the C++ kernels pay and cannot be built.
    """
    if precision == "int8":
        to_int8(model)
    if not compile or not model.accepts("state"):
        return _eager_step(model)
    return _compiled_step(model, precision, slots)


def _eager_step(model):
    def forward(ids, state):
        return model(ids, state=state)[0]

    return forward


@torch.inference_mode()
def _compiled_step(model, precision, slots):
    from torch._inductor import config as inductor  # takes as long to import as torch

    on_cpu = next(model.parameters()).device.type == "cpu"
    packed = on_cpu and decode.use_kernels(precision)
    forward = _eager_step(packed_copy(model) if packed else private_copy(model) if on_cpu else model)
    frozen = {}
    options = {}
    if on_cpu:
        # The copy is private, so its module guards can be skipped (10% of a step), and its weights become constants of
        # the compiled graph. The graphs of two models must then not be confused: they are kept per code object.
        forward.__code__ = forward.__code__.replace()
        frozen = {"freezing": True}
        options = {
            **frozen,
            "size_asserts": False,
            "alignment_asserts": False,
            "cpp.enable_floating_point_contract_flag": "fast",
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        }
    compiled = torch.compile(forward, options=options)

    def decode_step(ids, state):
        return (compiled if state.max_pos > 0 and ids.shape[1] == 1 else forward)(ids, state)

    with inductor.patch(frozen):  # as an option it reaches the compiler, but not the tracing of the weights
        for n_sequences in sorted({1, min(slots, FEW_ROWS), slots}):  # the layers choose their forms by these bounds
            with _explain_missing_compiler():
                _trace(model, compiled, n_sequences)
    return decode_step


@contextmanager
def _explain_missing_compiler():
    """A context in which torch.compile's error without a C++ compiler is a `ModelError`."""
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    try:
        yield
    except InductorError as error:
        if not isinstance(error.inner_exception, InvalidCxxCompiler):
            raise
        raise ModelError(
            "the compiled decode step needs a C++ compiler, and PyTorch finds none: install g++ (Debian: apt install "
            "g++), name one by CXX=..., or leave out --compile"
        ) from None


def _trace(model, compiled, n_sequences):
    """Compile for one sequence, or for any larger number, by taking a decode step in a state of any length.

    Dynamic dimensions are marked up front, to avoid recompilation.
    """
    longest = model.args.max_seq_len
    n_tokens = min(USUAL_LENGTH, longest // 2)  # a step at the end of its state would be a special case
    state = model.init_state(n_sequences, min(2 * USUAL_LENGTH, longest))
    state.last_only = True
    model(torch.zeros(n_sequences, n_tokens, dtype=torch.long, device=state.pos.device), state=state)
    state.advance(n_tokens)
    ids = torch.zeros(n_sequences, 1, dtype=torch.long, device=state.pos.device)
    held = [*state.layers, state.model]
    for tensor in (ids, state.pos, *(tensor for tensors in held for tensor in tensors.values())):
        if n_sequences > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    for tensors in held:
        for name in tensors.keys() & state.token_indexed:
            torch._dynamo.maybe_mark_dynamic(tensors[name], 1)
    with torch.compiler.config.patch(dynamic_sources="L['state'].max_pos,L['state'].max_len"):
        compiled(ids, state)


def private_copy(model):
    """Return a copy of a model's modules on the same weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def packed_copy(model):
    """Return a copy of a model on the same weights, in which the modules with a packed form are replaced by it.

    Those are every plain Linear, SwiGLU and stack of experts whose dtype the C++ kernels take.
    """
    decode.load()
    packer = Packer()
    copied = private_copy(model)
    for module in list(copied.modules()):
        names = getattr(module, "expert_weights", ())
        stacks = packer.pack_together([getattr(module, name) for name in names]) or ()
        for name, stack in zip(names, stacks):
            delattr(module, name)
            setattr(module, name, stack)
        for name, child in list(module.named_children()):
            form = packer.form_of(child)
            if form is not None:
                setattr(module, name, form)
    return copied
