"""The faster forms of a full model for decoding: int8 weights, a compiled decode step, and packed weights on a CPU.

A decode step is a forward of one token per sequence, after others. On a CPU it is compiled ahead of time into libraries
(model/kernels/ahead.py): one for a single sequence, one for 2 to 16 and one for more. On other devices torch.compile
compiles it in the process, once for each of these.
"""

import copy
import hashlib
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from model.kernels import ENABLED, ahead, decode
from model.kernels.build import cpu_description, find_compiler, private_folder
from model.kernels.int8 import to_int8
from model.kernels.matmul import FEW_ROWS
from model.kernels.packed import Packer
from utils.errors import ModelError

MANY_ROWS = 4096  # sequences of the largest library
SOURCES = Path(__file__).resolve().parent.parent
TOLERANCE = {"fp32": 1e-3}  # between the compiled and the plain logits, of their norm; in other precisions:
ROUNDED = 0.25


def prepare_for_decoding(model, precision="fp32", compile=False, slots=1):
    """Return `decode_step(ids, state) -> logits`, the forward (B, T) -> (B, 1|T, V) that inference is to call.

    precision: fp32, bf16, fp16 or int8. The weights already have it; for int8 they are in bf16, and the matrices among
    them are quantized here, in place. compile: compile the decode step for up to `slots` sequences; the weights must
    not change afterwards. A model without a state prefills the full text for every token, so it has no step to compile.
    Raises `ModelError` without a C++ compiler, and where the C++ kernels pay and cannot be built.
    """
    if precision == "int8":
        to_int8(model)
    step = PreparedStep(model, precision)
    if not compile or not model.accepts("state"):
        return step
    if step.on_cpu:
        try:
            with tempfile.TemporaryDirectory() as folder:
                for form in step.forms(slots):
                    step.build(form, Path(folder, str(form[0])))
                    step.load(form, Path(folder, str(form[0])))
            return step
        except ahead.CannotTrace:
            pass  # torch.compile takes more
    return compile_in_process(model, step, slots)


class PreparedStep:
    """The decode step of a model: plain, until compiled forms of it are loaded, at any time and from any thread.

    A form is the (least, most) number of sequences that it takes.
    """

    def __init__(self, model, precision):
        self.model = model
        self.precision = precision
        self.on_cpu = next(model.parameters()).device.type == "cpu"
        self.plain = _eager_step(model)
        self.compiled = {}  # {form: CompiledStep}
        self._packed = None

    def __call__(self, ids, state):
        """ids (B, T), state -> logits (B, 1|T, V)."""
        if self.compiled and ids.shape[1] == 1 and state.max_pos > 0:
            compiled = self.compiled.get(form_of(len(ids)))
            logits = None if compiled is None else compiled(ids, state)
            if logits is not None:
                return logits
        return self.plain(ids, state)

    @staticmethod
    def forms(slots):
        """Return the forms that up to `slots` sequences need, the most useful one first."""
        return sorted({form_of(slots), form_of(1), form_of(min(slots, FEW_ROWS))}, reverse=slots > 1)

    @torch.no_grad()
    def build(self, form, folder):
        """Compile a form into the new `folder`. Raises `ModelError` without a compiler, and `CannotTrace`."""
        compiler = find_compiler()[0]
        folder.mkdir()
        with _explain_missing_compiler():
            ahead.compile_step(self._for_compiling(), form, folder, compiler)

    @torch.inference_mode()
    def load(self, form, folder):
        """Load a form from `folder`, and use it from the next step on. Raises `CannotTrace` where it does not fit."""
        model = self._for_compiling()
        compiled = ahead.CompiledStep(model, folder)
        self._compare(compiled, _eager_step(model), form[0])
        if model is not self.model:
            self.plain = _eager_step(model)
        self.compiled[form] = compiled

    def _for_compiling(self):
        """Return the model, or its packed copy where the C++ kernels are used."""
        experts_only = not decode.kernels_pay(self.precision)
        if not decode.use_kernels(self.precision) or experts_only and not has_experts(self.model):
            return self.model
        if self._packed is None:
            self._packed = packed_copy(self.model, experts_only)
        return self._packed

    def _compare(self, compiled, plain, n_sequences):
        """Raise `CannotTrace` unless the step computes what the plain one does: the last check of a library."""
        ids = torch.arange(3 * n_sequences).view(n_sequences, 3) % self.model.args.vocab_size
        state = self.model.init_state(n_sequences, min(8, self.model.args.max_seq_len))
        plain(ids[:, :2], state)
        state.advance(2)
        expected = plain(ids[:, 2:], state.clone()).float()
        got = compiled(ids[:, 2:], state)
        if got is None:
            raise ahead.CannotTrace("its state has other tensors at another length")
        # a broken checkpoint has non-finite ones, and says nothing about a library, which is for all checkpoints
        got, expected = (x.nan_to_num(posinf=0, neginf=0) for x in (got.float(), expected))
        error = (got - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny)
        if not error < TOLERANCE.get(self.precision, ROUNDED):
            raise ahead.CannotTrace(f"its logits differ from the plain ones by {error:.2g} of their norm")


def form_of(n_sequences):
    """Return the (least, most) sequences of the form for `n_sequences`; the layers choose their own by these bounds."""
    return (1, 1) if n_sequences == 1 else (2, FEW_ROWS) if n_sequences <= FEW_ROWS else (FEW_ROWS + 1, MANY_ROWS)


def folder_of(form, model):
    """Return where a compiled form is kept; `model` is a text of the model's name, its arguments and its precision.

    The name is a digest of all that the form depends on: also the source of all models, PyTorch, the compiler, the CPU
    with its cores, and the switch of the kernels. Raises `ModelError` without a compiler or a folder of the user's own.
    """
    machine = find_compiler(), cpu_description(), os.cpu_count()
    parts = [repr((form, model, torch.__version__, *machine, ENABLED))]
    for path in sorted(SOURCES.rglob("*.*")):
        if path.suffix in (".py", ".cpp"):
            parts += [path.name, path.read_text(encoding="utf-8")]
    return private_folder("steps") / hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _eager_step(model):
    def forward(ids, state):
        return model(ids, state=state)[0]

    return forward


@torch.inference_mode()
def compile_in_process(model, step, slots):
    """Return the decode step `step` compiled by torch.compile, for up to `slots` sequences."""
    forward = step.plain
    forward.__code__ = forward.__code__.replace()  # graphs are kept per code object: none is shared with another model
    compiled = torch.compile(forward)
    for n_sequences in sorted({1, min(slots, FEW_ROWS), slots}):
        with _explain_missing_compiler():
            _trace(model, compiled, n_sequences)

    def decode_step(ids, state):
        return (compiled if state.max_pos > 0 and ids.shape[1] == 1 else forward)(ids, state)

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
    n_tokens = min(ahead.USUAL_LENGTH, longest // 2)  # a step at the end of its state would be a special case
    state = model.init_state(n_sequences, min(2 * ahead.USUAL_LENGTH, longest))
    state.last_only = True
    model(torch.zeros(n_sequences, n_tokens, dtype=torch.long, device=state.pos.device), state=state)
    state.advance(n_tokens)
    ids = torch.zeros(n_sequences, 1, dtype=torch.long, device=state.pos.device)
    held = [*state.layers, state.model]
    for tensor in (ids, state.pos, *(tensor for tensors in held for tensor in tensors.values())):
        if n_sequences > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    for tensors in held:
        for tensor in (tensors[name] for name in tensors.keys() & state.rewindable):
            if tensor.shape[1:2] == (state.max_len,):  # a ring has one size
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
    with torch.compiler.config.patch(dynamic_sources="L['state'].max_pos,L['state'].max_len"):
        compiled(ids, state)


def private_copy(model):
    """Return a copy of a model's modules on the same weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def has_experts(model):
    """Whether a module of the model names stacks of experts."""
    return any(getattr(module, "expert_weights", ()) for module in model.modules())


def packed_copy(model, experts_only=False):
    """Return a copy of a model on the same weights, in which the modules with a packed form are replaced by it.

    Those are every stack of experts and, unless experts_only, every plain Linear and SwiGLU whose dtype the C++ kernels
    take.
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
        for name, child in [] if experts_only else list(module.named_children()):
            form = packer.form_of(child)
            if form is not None:
                setattr(module, name, form)
    return copied
