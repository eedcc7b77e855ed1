"""prepare_for_decoding: a compiled decode step, on a machine where the C++ kernels pay and on one where they do not."""

import copy
from pathlib import Path

import pytest
import torch

from engine.inference.chat import open_chat_model
from engine.inference.generate import generate
from engine.runs import registry
from engine.runs.registry import LoadedRun
from model import kernels
from model.kernels import build, decode
from model.kernels.packed import Packed, PackedLinear, PackedSwiGLU
from model.kernels.prepare import packed_copy, prepare_for_decoding
from tests.support.decode_kernels import why_not_built
from tests.support.decode_step import WithDecodeStep
from tests.support.decoding_models import PROMPTS, TOKENIZER, bf16
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
    monkeypatch.setattr(decode, "_loaded", False)
    monkeypatch.setattr(build, "load_extension", must_not_build)
    monkeypatch.setattr(decode, "load_extension", must_not_build)


MACHINES = pytest.mark.parametrize("machine", [with_kernels, without_kernels])


def answers(model, prompts=PROMPTS, n=25, decode_step=None, **settings):
    decoding = model if decode_step is None else WithDecodeStep(model, decode_step)
    return generate(decoding, TOKENIZER, prompts, n, stop_ids=(), temperature=0, **settings)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_kernels_are_used_where_the_cpu_has_avx512_bf16(monkeypatch, precision):
    for capable in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capable=capable: {"avx512_bf16": capable})
        assert decode.kernels_pay(precision) == (capable and precision != "fp16")
        assert decode.use_kernels(precision) == (decode.kernels_pay(precision) and kernels.ENABLED)
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # a CPU of another make
        assert not decode.kernels_pay(precision)


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
    with open_chat_model("run", device="cpu", compile=True):
        assert "this model keeps no state" in capsys.readouterr().err


def test_without_a_compiler_the_error_is_one_line(monkeypatch):
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    without_kernels(monkeypatch)

    def no_compiler(*_, **__):
        raise InductorError(InvalidCxxCompiler(), None)

    monkeypatch.setattr(torch, "compile", lambda forward, options: no_compiler)
    with pytest.raises(UserError, match="needs a C.. compiler, .*--compile$"):
        prepare_for_decoding(build_model(BASE_MODEL), compile=True)


def test_where_kernels_do_not_pay_no_extension_is_built(monkeypatch):
    """The step compiled there is made of the plain modules; the compiler itself is replaced by eager execution."""
    without_kernels(monkeypatch)
    real_compile = torch.compile
    for name in SHIPPED:
        model = build_model(name)
        plain = answers(model)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", lambda forward, options: real_compile(forward, backend="eager"))
            step = prepare_for_decoding(model, compile=True, slots=len(PROMPTS))
        assert answers(model, decode_step=step) == plain
        assert not any(isinstance(module, PACKED) for module in model.modules())


@MACHINES
@pytest.mark.slow
@pytest.mark.parametrize("name, precision", [(BASE_MODEL, "fp32"), (BASE_MODEL, "int8"), ("Recurrent", "fp32")])
def test_a_compiled_step_has_the_tokens_of_the_plain_one(name, precision, machine, monkeypatch):
    """In fp32, where no rounding decides; alone and side by side; speculating too."""
    machine(monkeypatch)
    model = build_model(name)
    eager = prepare_for_decoding(copy.deepcopy(model), precision)
    plain = answers(model, decode_step=eager)
    step = prepare_for_decoding(model, precision, compile=True, slots=len(PROMPTS))
    assert answers(model, PROMPTS[:1], decode_step=step) == plain[:1]
    assert answers(model, decode_step=step) == plain
    assert answers(model, PROMPTS[:1], decode_step=step, speculative="ngram") == plain[:1]


@MACHINES
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, longest, slots",
    [
        *((name, 300, 3) for name in SHIPPED),
        (CHAT_MODEL, 48, 3),
        (BASE_MODEL, 48, 20),
        ("Recurrent", 48, 3),
    ],
)
def test_no_recompilation_for_any_length_and_number_of_sequences(name, longest, slots, machine, monkeypatch):
    """A later compilation would happen in the middle of an answer, and without frozen weights."""
    machine(monkeypatch)
    model = bf16(build_model(name, longest))
    step = prepare_for_decoding(model, "bf16", compile=True, slots=slots)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count, length in ((1, 1), (1, 250), (2, 7), (slots, 250), (slots, 1)):  # across 256 keys
            length = min(length, longest - 12)
            answers(model, [[5] * length] * count, 12, decode_step=step)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


@MACHINES
@pytest.mark.slow
def test_two_compiled_models_are_not_confused(machine, monkeypatch):
    """Their graphs are made of the same code, and differ in the weights that they hold."""
    machine(monkeypatch)
    first, second = build_model(CHAT_MODEL), build_model(CHAT_MODEL)
    with torch.no_grad():
        second.norm.weight.mul_(torch.linspace(-1, 1, len(second.norm.weight)))
    for model, precision in ((first, "fp32"), (second, "int8")):
        eager = prepare_for_decoding(copy.deepcopy(model), precision)
        plain = answers(model, PROMPTS[:1], 12, decode_step=eager)
        step = prepare_for_decoding(model, precision, compile=True)
        assert answers(model, PROMPTS[:1], 12, decode_step=step) == plain


def test_a_packed_copy_is_made_where_kernels_pay(monkeypatch):
    with_kernels(monkeypatch)
    assert decode.use_kernels("bf16") and not decode.use_kernels("fp16")
    copied = packed_copy(bf16(build_model(BASE_MODEL)))
    assert any(isinstance(module, PACKED) for module in copied.modules())
