"""prepare_for_decoding: a compiled decode step, on a machine where the C++ kernels pay and on one where they do not."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from engine.inference.chat import open_chat_model
from engine.inference.generate import generate
from engine.runs import registry
from engine.runs.registry import LoadedRun
from model import kernels
from model.kernels import ahead, build, decode
from model.kernels.packed import Packed, PackedLinear, PackedSwiGLU
from model.kernels.prepare import form_of, has_experts, packed_copy, prepare_for_decoding
from tests.mutants.unusual import Recurrent
from tests.support.decode_kernels import why_not_built
from tests.support.decode_step import WithDecodeStep
from tests.support.decoding_models import PROMPTS, TOKENIZER, UNUSUAL_MODELS, V, bf16
from tests.support.decoding_models import build as build_model
from tests.support.models import BASE_MODEL, CHAT_MODEL, SHIPPED
from utils.errors import UserError

PACKED = Packed, PackedLinear, PackedSwiGLU


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def with_kernels(monkeypatch):
    """A machine where the kernels pay, whatever this one is."""
    if not kernels.ENABLED:
        pytest.skip("MINI_LLM_KERNELS=0 turns the kernels off")
    if why_not_built():
        pytest.skip(why_not_built())
    monkeypatch.setattr(decode, "kernels_pay", lambda precision: precision in decode.PRECISIONS)


def without_kernels(monkeypatch):
    """A machine where they do not pay, and where nothing can be built."""

    def must_not_build(*_):
        raise AssertionError("an extension is built")

    monkeypatch.setattr(decode, "kernels_pay", lambda precision: False)
    monkeypatch.setattr(decode, "experts_pay", lambda precision: False)
    monkeypatch.setattr(decode, "_loaded", False)
    monkeypatch.setattr(build, "load_extension", must_not_build)
    monkeypatch.setattr(decode, "load_extension", must_not_build)


MACHINES = pytest.mark.parametrize("machine", [with_kernels, without_kernels])


def answers(model, prompts=PROMPTS, n=25, decode_step=None, **settings):
    decoding = model if decode_step is None else WithDecodeStep(model, decode_step)
    return generate(decoding, TOKENIZER, prompts, n, stop_ids=(), temperature=0, **settings)


@pytest.mark.parametrize(
    "able, all_pay, experts_pay",
    [
        ({"avx512_bf16": True, "avx2": True}, {"fp32", "bf16", "int8"}, {"fp32", "bf16", "int8"}),
        ({"avx512_bf16": False, "avx2": True}, set(), {"bf16", "int8"}),
        ({"avx2": False}, set(), set()),
        ({}, set(), set()),  # a CPU of another make
    ],
)
def test_kernels_are_used_by_what_the_cpu_can_do(monkeypatch, able, all_pay, experts_pay):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    precisions = ["fp32", "bf16", "fp16", "int8"]
    assert {p for p in precisions if decode.kernels_pay(p)} == all_pay
    assert {p for p in precisions if decode.experts_pay(p)} == experts_pay
    assert {p for p in precisions if decode.use_kernels(p)} == (experts_pay if kernels.ENABLED else set())


@pytest.mark.parametrize("name", [*SHIPPED, "Recurrent"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_eager_decode_step_is_the_model(name, precision):
    model = build_model(name)
    step = prepare_for_decoding(model, precision)
    assert answers(model, decode_step=step) == answers(model)


def test_a_model_without_a_state_is_not_compiled_and_that_is_a_warning(monkeypatch, capsys):
    def must_not_compile(*_, **__):
        raise AssertionError("a model without a state is compiled")

    run = LoadedRun(build_model("no state"), TOKENIZER, {"stage": "sft"}, Path("run"), Path("run/final"), "")
    monkeypatch.setattr(registry, "load_run", lambda *_, **__: run)
    monkeypatch.setattr(torch, "compile", must_not_compile)
    with open_chat_model("run", device="cpu", compile="true"):
        assert "this model keeps no state" in capsys.readouterr().err


def test_without_a_compiler_the_error_is_one_line(monkeypatch):
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    without_kernels(monkeypatch)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no such program; .*--compile$"):
        prepare_for_decoding(build_model(BASE_MODEL), compile=True)

    def no_compiler(*_, **__):
        raise InductorError(InvalidCxxCompiler(), None)

    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(ahead, "compile_step", no_compiler)
    with pytest.raises(UserError, match="needs a C.. compiler, .*--compile$"):
        prepare_for_decoding(build_model(BASE_MODEL), compile=True)


@MACHINES
def test_where_kernels_do_not_pay_the_model_itself_is_compiled(machine, monkeypatch, tmp_path):
    """And no extension is built; elsewhere its packed copy is."""
    machine(monkeypatch)
    monkeypatch.setenv("CXX", "g++" if machine is with_kernels else sys.executable)
    compiled = []
    monkeypatch.setattr(ahead, "compile_step", lambda model, *_: compiled.append(model))
    for name in SHIPPED:
        model = build_model(name)
        prepare_for_decoding(model).build((1, 1), tmp_path / name)
        assert (compiled[-1] is model) == (machine is without_kernels)
        assert any(isinstance(m, PACKED) for m in compiled[-1].modules()) == (machine is with_kernels)
        assert not any(isinstance(m, PACKED) for m in model.modules())


@pytest.mark.parametrize(
    "slots, forms",
    [(1, [(1, 1)]), (2, [(2, 16), (1, 1)]), (16, [(2, 16), (1, 1)]), (17, [(17, 4096), (2, 16), (1, 1)])],
)
def test_a_form_for_every_number_of_sequences(slots, forms):
    step = prepare_for_decoding(build_model("Recurrent"))
    assert step.forms(slots) == forms
    assert {form_of(n) for n in range(1, slots + 1)} == set(forms)


class Branching(Recurrent):
    """A plugin whose forward takes another path behind its first tokens."""

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        logits, loss, other_vars = super().forward(input_ids, targets, state, doc_ids)
        if state is not None and state.max_pos > 20:
            logits = logits * 2
        return logits, loss, other_vars


@pytest.mark.slow
def test_a_step_that_takes_two_paths_is_no_library(monkeypatch, tmp_path):
    """Its library would be wrong before or behind the branch. torch.compile compiles both."""
    without_kernels(monkeypatch)
    torch.manual_seed(0)
    model = Branching(Branching.Args(vocab_size=V, max_seq_len=48)).eval()
    plain = answers(model, PROMPTS[:1])
    with pytest.raises(ahead.CannotTrace, match="another path"):
        prepare_for_decoding(model).build((1, 1), tmp_path / "form")
    assert answers(model, PROMPTS[:1], decode_step=prepare_for_decoding(model, compile=True)) == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "machine, name, precision",
    [
        (with_kernels, BASE_MODEL, "fp32"),
        (with_kernels, BASE_MODEL, "int8"),
        (without_kernels, BASE_MODEL, "int8"),
        (without_kernels, "Recurrent", "fp32"),
    ],
)
def test_a_compiled_step_has_the_tokens_of_the_plain_one(machine, name, precision, monkeypatch):
    """In fp32, where no rounding decides; alone and side by side; speculating too."""
    machine(monkeypatch)
    model = build_model(name)
    eager = prepare_for_decoding(copy.deepcopy(model), precision)
    plain = answers(model, decode_step=eager)
    step = prepare_for_decoding(model, precision, compile=True, slots=len(PROMPTS))
    assert answers(model, PROMPTS[:1], decode_step=step) == plain[:1]
    assert answers(model, decode_step=step) == plain
    assert answers(model, PROMPTS[:1], decode_step=step, speculative="ngram") == plain[:1]


class Counted:
    """A compiled form that counts the steps it took, and those that it left to the plain one."""

    def __init__(self, step):
        self.step, self.taken, self.left = step, 0, 0

    def __call__(self, ids, state):
        logits = self.step(ids, state)
        self.taken += logits is not None
        self.left += logits is None
        return logits


def counted(step):
    step.compiled = {form: Counted(compiled) for form, compiled in step.compiled.items()}
    return step.compiled.values()


@pytest.mark.slow
@pytest.mark.parametrize(
    "machine, name, longest, slots",
    [
        *((without_kernels, name, 300, 3) for name in SHIPPED),
        (with_kernels, BASE_MODEL, 300, 20),
        *((without_kernels, name, 48, 3) for name in UNUSUAL_MODELS),
    ],
)
def test_one_library_for_any_length_and_number_of_sequences(machine, name, longest, slots, monkeypatch):
    """The tokens of the plain step; only the last token of a full state is left to it."""
    machine(monkeypatch)
    model = build_model(name, longest)
    eager = prepare_for_decoding(model)
    step = prepare_for_decoding(model, compile=True, slots=slots)
    forms = counted(step)
    for count, length in ((1, 1), (1, 250), (2, 7), (slots, 250), (slots, 1)):  # across 256 keys
        prompts = [[5 + n] * min(length, longest - 12) for n in range(count)]
        assert answers(model, prompts, 12, decode_step=step) == answers(model, prompts, 12, decode_step=eager)
    assert all(form.taken > 10 for form in forms) and sum(form.left for form in forms) <= 5


@pytest.mark.slow
def test_one_library_for_every_checkpoint(monkeypatch, tmp_path):
    """It holds no weights; a model of other sizes is refused, and so is a library that computes something else."""
    without_kernels(monkeypatch)
    first, second = build_model(CHAT_MODEL), build_model(CHAT_MODEL)
    with torch.no_grad():
        second.norm.weight.mul_(torch.linspace(-1, 1, len(second.norm.weight)))
    prepare_for_decoding(first).build((1, 1), tmp_path / "form")
    for model in (first, second):
        step = prepare_for_decoding(model)
        plain = answers(model, PROMPTS[:1], 12, decode_step=step)
        step.load((1, 1), tmp_path / "form")
        (form,) = counted(step)
        assert answers(model, PROMPTS[:1], 12, decode_step=step) == plain and form.taken
    with pytest.raises(ahead.CannotTrace, match="other weights"):
        prepare_for_decoding(build_model(CHAT_MODEL, 50)).load((1, 1), tmp_path / "form")
    monkeypatch.setattr(first, "forward", lambda *args, real=first.forward, **kw: (real(*args, **kw)[0] + 1, None, {}))
    with pytest.raises(ahead.CannotTrace, match="differ from the plain"):
        prepare_for_decoding(first).load((1, 1), tmp_path / "form")


def test_a_broken_checkpoint_does_not_condemn_a_library():
    """It is shared by all checkpoints of an architecture; NaN where the plain step has numbers is refused."""
    model = build_model(CHAT_MODEL)
    step = prepare_for_decoding(model)

    def broken(ids, state):
        return step.plain(ids, state) * float("nan")

    with torch.no_grad():
        step._compare(step.plain, step.plain, 2)
        step._compare(broken, broken, 2)
        for got, expected in ((broken, step.plain), (step.plain, broken)):
            with pytest.raises(ahead.CannotTrace, match="differ from the plain"):
                step._compare(got, expected, 2)


def test_a_packed_copy_is_made_where_kernels_pay(monkeypatch):
    with_kernels(monkeypatch)
    assert decode.use_kernels("bf16") and not decode.use_kernels("fp16")
    copied = packed_copy(bf16(build_model(BASE_MODEL)))
    assert any(isinstance(module, PACKED) for module in copied.modules())


@pytest.mark.parametrize("name", SHIPPED)
def test_experts_alone_are_packed_where_the_other_kernels_do_not_pay(monkeypatch, name):
    with_kernels(monkeypatch)
    monkeypatch.setattr(decode, "kernels_pay", lambda precision: False)
    monkeypatch.setattr(decode, "experts_pay", lambda precision: True)
    model = bf16(build_model(name))
    compiled = prepare_for_decoding(model, "bf16")._for_compiling()
    assert (compiled is model) == (not has_experts(model))
    assert {type(module) for module in compiled.modules() if isinstance(module, PACKED)} <= {Packed}
