"""The C++ kernels of a decode step on the CPU, compared with the formulas in float64."""

import copy
import os
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from engine.inference.generate import generate
from model import kernels
from model.kernels import decode
from model.kernels.decode import one_query_attention, visible_keys
from model.kernels.int8 import Int8Weight, to_int8
from model.kernels.packed import PER_STEP, Packed, PackedLinear, PackedSwiGLU, pack, packed_experts
from model.kernels.prepare import packed_copy
from model.layers import SwiGLU, attention_mask
from tests.support.decode_kernels import why_not_built
from tests.support.decoding_models import PROMPTS, TOKENIZER, bf16, build
from tests.support.models import SHIPPED

pytestmark = pytest.mark.skipif(not kernels.ENABLED, reason="MINI_LLM_KERNELS=0 turns the kernels off")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # of one result; sums are fp32


@pytest.fixture(autouse=True)
def loaded():
    if why_not_built():
        pytest.skip(why_not_built())
    decode.load()
    torch.manual_seed(0)


def held(weight, precision):
    """Return a weight (..., F, D) as a model holds it, and its exact value in float64."""
    if precision == "int8":
        weight = Int8Weight(weight.bfloat16())
        return weight, weight.q.double() * weight.scale.double()[..., None]
    weight = weight.to(getattr(torch, precision))
    return weight, weight.double()


def inputs(*sizes, precision):
    return torch.randn(sizes, dtype=torch.float32 if precision == "float32" else torch.bfloat16)


def assert_near(got, exact, of, times=1):
    """Within the rounding of values of the size `of`, the sum of the magnitudes that were added up."""
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= times * ROUNDING[got.dtype] * of).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("n_outputs, n_inputs", [(64, 32), (37, 51), (1, 1), (32, 130), (200, 7)])
@pytest.mark.parametrize("tokens", [(1,), (2,), (3, 1), (8,), (2, 9), (0,)])
def test_linear(precision, n_outputs, n_inputs, tokens):
    weight, exact = held(torch.randn(n_outputs, n_inputs) * torch.logspace(-3, 3, n_outputs)[:, None], precision)
    x = inputs(*tokens, n_inputs, precision=precision)
    assert_near(Packed.of(weight)(x), x.double() @ exact.T, x.double().abs() @ exact.abs().T)


def test_linear_of_tokens_that_are_not_contiguous():
    weight, x = torch.randn(40, 16), torch.randn(16, 3).T
    torch.testing.assert_close(Packed.of(weight)(x), x @ weight.T)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_tokens_that_are_not_aligned_to_a_step(precision):
    """A contiguous slice of bf16 may begin between two words of the kernel's."""
    weight = Packed.of(held(torch.randn(40, 16), precision)[0])
    storage = torch.randn(1 + 3 * 16).bfloat16()
    x = storage[1:].view(3, 16)
    assert x.is_contiguous() and x.data_ptr() % 4
    assert torch.equal(weight(x), weight(x.clone()))
    stack = Packed.of(held(torch.randn(2, 16, 16), precision)[0])
    chosen = torch.tensor([[0], [1], [0]])
    assert torch.equal(packed_experts(x, chosen, *[stack] * 3), packed_experts(x.clone(), chosen, *[stack] * 3))


def test_non_finite_values_stay_non_finite():
    x = torch.tensor([[1.0, float("inf")], [float("nan"), 1.0], [1.0, 1.0]])
    for dtype in ROUNDING:
        out = Packed.of(torch.ones(3, 2, dtype=dtype))(x.to(dtype))
        assert out[0].isinf().all() and out[1].isnan().all() and (out[2] == 2).all()
        for stack in ((3, 2, 2), (2, 2)):
            gate = Packed.of(torch.ones(stack, dtype=dtype))
            out = packed_experts(x.to(dtype), torch.zeros(3, 1, dtype=torch.long), gate, gate, gate)
            assert out[0].isinf().all() and out[1].isnan().all() and out[2].isfinite().all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("n_experts, width, dim, active", [(8, 48, 32, 2), (5, 33, 27, 3), (1, 64, 16, 1)])
@pytest.mark.parametrize("n_tokens", [1, 8, 21])
def test_chosen_experts(precision, n_experts, width, dim, active, n_tokens):
    shapes = (n_experts, width, dim), (n_experts, width, dim), (n_experts, dim, width)
    stacks, exact = zip(*(held(torch.randn(shape) * dim**-0.5, precision) for shape in shapes))
    x = inputs(n_tokens, dim, precision=precision)
    chosen = torch.stack([torch.randperm(n_experts)[:active] for _ in range(n_tokens)])
    got = packed_experts(x, chosen, *(Packed.of(stack) for stack in stacks))
    assert got.shape == (n_tokens, active, dim)
    for token, experts, outs in zip(x.double(), chosen.tolist(), got):
        for expert, out in zip(experts, outs):
            gate, up, down = (stack[expert] for stack in exact)
            hidden = F.silu(gate @ token) * (up @ token)
            assert_near(out, down @ hidden, down.abs() @ ((gate.abs() @ token.abs() + 1) * (up.abs() @ token.abs())), 3)


def exact_attention(q, k, v, mask, scale):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return ((q @ k.mT * scale).masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads, groups, k_dim, v_dim", [(6, 2, 64, 64), (12, 1, 48, 32), (5, 5, 19, 7), (1, 1, 16, 40)]
)
@pytest.mark.parametrize("n_keys", [1, 15, 16, 65, 700])
def test_attention_of_one_query(dtype, heads, groups, k_dim, v_dim, n_keys):
    batch, scale = 3, k_dim**-0.5
    q = torch.randn(batch, 1, heads, k_dim).mul(3).to(dtype)
    cache = torch.randn(batch, n_keys + 5, groups, k_dim + v_dim).to(dtype)
    mask = torch.arange(n_keys) < torch.tensor([n_keys, 1 + n_keys // 2, 1])[:, None]
    mask = mask[:, None, None]
    cache[~F.pad(mask[:, 0, 0], (0, 5))] = float("nan")  # leftovers after the last visible key
    k, v = cache[:, :n_keys].split((k_dim, v_dim), dim=-1)
    got = one_query_attention(q, k, v, mask, scale)
    seen = mask[:, 0, 0, :, None, None]
    exact = exact_attention(q, k.where(seen, 0), v.where(seen, 0), mask, scale)
    assert_near(got, exact, exact_attention(q, k.where(seen, 0), v.where(seen, 0).abs(), mask, scale), 3)


def test_attention_skips_keys_masked_in_the_middle():
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 300, 2, 16), torch.randn(2, 300, 2, 16)
    mask = torch.rand(2, 1, 1, 300) < 0.3
    mask[..., :130] = False  # full tiles, the first among them
    torch.testing.assert_close(
        one_query_attention(q, k, v, mask, 1.0).double(), exact_attention(q, k, v, mask, 1.0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_key_of_infinite_score_is_not_seen(dtype):
    q, k = torch.ones(1, 1, 1, 16), torch.tensor([float("inf"), 0, 1]).view(1, 3, 1, 1).expand(1, 3, 1, 16).contiguous()
    v, mask = torch.randn(1, 3, 1, 16), torch.tensor([False, True, True]).view(1, 1, 1, 3)
    got = one_query_attention(*(x.to(dtype) for x in (q, k, v)), mask, 1.0)
    assert_near(got, exact_attention(q, k, v.to(dtype), mask, 1.0), v.double().abs().amax(1, keepdim=True), 3)
    alone = k[:, :1].neg()
    assert one_query_attention(q, alone, v[:, :1], mask[..., 1:2], 1.0).isnan().all()  # as of a softmax


def test_attention_is_exact_where_scores_are_far_apart():
    q, k = torch.full((1, 1, 1, 4), 10.0), torch.linspace(-30, 30, 200).view(1, 200, 1, 1).expand(1, 200, 1, 4)
    v, mask = torch.randn(1, 200, 1, 4), torch.ones(1, 1, 1, 200, dtype=torch.bool)
    got = one_query_attention(q, k, v, mask, 1.0)  # scores from -1200 to 1200
    torch.testing.assert_close(got.double(), exact_attention(q, k, v, mask, 1.0), rtol=1e-4, atol=1e-5)


def test_visible_keys_are_those_up_to_the_position():
    positions = torch.tensor([[3, 4], [0, 1], [70, 71]]).T.contiguous().T  # not in order in memory
    want = (torch.arange(72) <= positions[..., None])[:, None]
    assert torch.equal(visible_keys(positions, 72), want)
    assert torch.equal(visible_keys(positions, 50), want[..., :50])
    assert visible_keys(positions[:0], 50).shape == (0, 1, 2, 50)
    torch.library.opcheck(torch.ops.mini_llm.visible, (positions, 72), test_utils="test_faketensor")


@torch.no_grad()
def test_a_compiled_mask_is_the_mask():
    compiled = torch.compile(attention_mask, backend="eager", fullgraph=True)
    for positions in torch.tensor([[3], [0], [9]]), torch.tensor([[9]]), torch.tensor([[2]], dtype=torch.int32):
        state = SimpleNamespace(max_pos=9)
        assert torch.equal(compiled(positions, state), attention_mask(positions, state))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_result(threads):
    before = torch.get_num_threads()
    weight, x = torch.randn(100, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    want = Packed.of(weight)(x)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(Packed.of(weight)(x), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", [*SHIPPED, "Recurrent", "Hybrid"])
@pytest.mark.parametrize("is_int8", [False, True])
@torch.no_grad()
def test_a_packed_copy_computes_as_the_model(name, is_int8):
    """On the same weights, which it leaves alone; in a prefill and token by token."""
    model = to_int8(bf16(build(name))) if is_int8 else build(name)
    before = copy.deepcopy(model.state_dict())
    copied, ids = packed_copy(model), torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    assert any(isinstance(module, (PackedLinear, PackedSwiGLU, Packed)) for module in copied.modules())
    assert not any(isinstance(module, (PackedLinear, PackedSwiGLU, Packed)) for module in model.modules())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in before.items())
    want, got = (one(ids)[0].float() for one in (model, copied))
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
    if is_int8:
        assert errors.median() < 0.05  # a tie that is rounded otherwise sends a token to another expert
    else:
        assert errors.max() < 1e-5
        plain = generate(model, TOKENIZER, PROMPTS, 12, stop_ids=(), temperature=0)
        assert generate(copied, TOKENIZER, PROMPTS, 12, stop_ids=(), temperature=0) == plain


def test_a_linear_keeps_its_bias_and_shows_its_weight():
    linear = torch.nn.Linear(40, 24).bfloat16()
    x = torch.randn(1, 3, 40).bfloat16()
    copied = packed_copy(torch.nn.Sequential(linear))
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    torch.testing.assert_close(copied(x).double(), exact, rtol=0.02, atol=0.02)
    assert copied[0].weight is linear.weight


class Twice(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_and_hooked_modules_are_not_replaced():
    """A subclass, within a SwiGLU too, and a module with a hook."""
    model = torch.nn.Sequential(SwiGLU(8, 16), SwiGLU(8, 16), SwiGLU(8, 16), torch.nn.Linear(8, 8), Twice(8, 8))
    model[0].down_proj = Twice(16, 8, bias=False)
    model[1].register_forward_hook(lambda module, given, out: out + 1)
    model[2].up_proj.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    model[3].register_forward_hook(lambda module, given, out: out * 3)
    copied, x = packed_copy(model), torch.randn(5, 8)
    torch.testing.assert_close(copied(x), model(x))
    assert [type(module) for module in copied] == [SwiGLU, SwiGLU, SwiGLU, torch.nn.Linear, Twice]
    assert type(copied[0].gate_proj) is type(copied[1].gate_proj) is PackedLinear
    assert copied[0].gate_proj.out_features == 16 and copied[0].gate_proj.bias is None


def test_stacks_of_different_dtypes_stay_as_they_are():
    module = torch.nn.Module()
    module.expert_weights = ("a", "b")
    module.a, module.b = (torch.nn.Parameter(torch.ones(2, 4, 4, dtype=t)) for t in (torch.float32, torch.bfloat16))
    assert isinstance(packed_copy(module).a, torch.nn.Parameter)


def test_dtypes_without_a_kernel_stay_as_they_are():
    for other in (torch.float16, torch.float64):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), SwiGLU(8, 16)).to(other)
        copied = packed_copy(model)
        assert type(copied[0]) is torch.nn.Linear and type(copied[1]) is SwiGLU
        x = torch.randn(2, 8).to(other)
        assert torch.equal(copied(x), model(x))
    mixed = torch.nn.Sequential(SwiGLU(8, 16))
    mixed[0].down_proj.double()
    copied = packed_copy(mixed)
    assert type(copied[0]) is SwiGLU and type(copied[0].gate_proj) is PackedLinear
    assert type(copied[0].down_proj) is torch.nn.Linear


def test_packing_is_lossless():
    for dtype, per_step in PER_STEP.items():
        weight = torch.randint(-100, 100, (3, 37, 51)).to(dtype)
        packed = pack(weight)
        assert packed.shape == (3, 2, -(-51 // per_step), 32, per_step)
        back = packed.transpose(-3, -2).flatten(-2).flatten(1, 2)
        assert torch.equal(back[:, :37, :51], weight)
        assert not back[:, 37:].any() and not back[..., 51:].any()


RUN = "from model.kernels import decode; decode.load()"


def last_line_of_load(**environment):
    """Load in a new process that fails; its error line."""
    done = subprocess.run(
        [sys.executable, "-c", RUN], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode and "ModelError" in done.stderr.splitlines()[-1]
    return done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_missing_build_tool_is_one_line(tmp_path):
    """And a failed build leaves nothing in the cache."""
    cache = str(tmp_path / "cache")
    programs = tmp_path / "programs"
    programs.mkdir()
    assert "CXX" in last_line_of_load(XDG_CACHE_HOME=cache, CXX="false")
    assert "no such program" in last_line_of_load(XDG_CACHE_HOME=cache, CXX="no-such-compiler -x")
    assert "install g++" in last_line_of_load(XDG_CACHE_HOME=cache, CXX="", PATH=str(programs))
    assert "cannot keep" in last_line_of_load(XDG_CACHE_HOME=__file__)
    (programs / "g++").write_text("#!/bin/sh\nexit 1\n")
    (programs / "g++").chmod(0o755)
    hide_packages = "import sysconfig; sysconfig.get_path = lambda name: '/nowhere'; "
    done = subprocess.run(
        [sys.executable, "-c", hide_packages + RUN],
        env={**os.environ, "XDG_CACHE_HOME": cache, "CXX": "", "PATH": str(programs)},
        capture_output=True,
        text=True,
    )
    assert "pip install ninja" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "cache" / "mini_llm").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs the permissions of POSIX")
def test_a_library_that_others_could_replace_is_not_loaded(tmp_path):
    folder = tmp_path / "mini_llm"
    folder.mkdir()
    folder.chmod(0o777)
    assert "chmod 700" in last_line_of_load(XDG_CACHE_HOME=str(tmp_path))


@pytest.mark.slow
def test_two_processes_may_build_at_once(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", RUN], env=environment) for _ in range(2)]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    folder = tmp_path / "mini_llm"
    assert [path.suffix for path in folder.iterdir()] == [".so"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 or os.name != "posix"


# ---------------------------------------------------------------- misfits: an error before anything is read


def fails(call, *args):
    with pytest.raises(RuntimeError):
        call(*args)


def test_linear_refuses_arguments_that_do_not_fit():
    ops = torch.ops.mini_llm
    x, weight, scale = torch.ones(2, 40), pack(torch.ones(70, 40)), torch.ones(96)
    assert ops.linear(x, weight, scale, 70).shape == (2, 70)
    for n_outputs in (64, 97, 0, -1):  # 3 blocks of 32 hold 65 to 96 outputs
        fails(ops.linear, x, weight, None, n_outputs)
    for wrong in (scale[:70], scale.double(), torch.ones(192)[::2], torch.ones(128)):
        fails(ops.linear, x, weight, wrong, 70)
    for wrong in (weight[0], weight[None], weight.transpose(0, 1), weight[:, :, :16], weight.half(), weight[:, :39]):
        fails(ops.linear, x, wrong, None, 70)
    fails(ops.linear, x, torch.ones(3, 40, 32, 2), None, 70)  # the layout of bf16
    for wrong in (x.bfloat16(), x[:, :39], torch.ones(2, 41), torch.tensor(1.0)):
        fails(ops.linear, wrong, weight, None, 70)
    int8 = pack(torch.ones(70, 40, dtype=torch.int8))
    fails(ops.linear, x, int8, scale, 70)
    fails(ops.linear, torch.ones(2, 36).bfloat16(), int8, scale, 70)


def test_experts_refuse_arguments_that_do_not_fit():
    x, chosen = torch.ones(2, 40), torch.zeros(2, 1, dtype=torch.long)
    stack, scale = pack(torch.ones(2, 40, 40)), torch.ones(2, 64)

    def experts(x=x, chosen=chosen, gate=stack, up=stack, down=stack, scales=()):
        return torch.ops.mini_llm.experts(x, chosen, [gate, up, down, *scales])

    assert experts(scales=[scale] * 3).shape == (2, 1, 40)
    assert experts(x[:0], chosen[:0]).shape == (0, 1, 40)
    for wrong in (x[0], x.bfloat16(), x[:, :39], torch.ones(2, 41), torch.ones(3, 40)):
        fails(lambda wrong: experts(x=wrong), wrong)
    for wrong in (chosen[:, 0], chosen.int(), chosen[:1]):
        fails(lambda wrong: experts(chosen=wrong), wrong)
    other = pack(torch.ones(2, 72, 40)), pack(torch.ones(3, 40, 40)), pack(torch.ones(2, 40, 40).bfloat16())
    for wrong in (stack[0], stack[:1], stack.transpose(0, 1), stack.half(), *other):
        for name in ("gate", "up", "down"):
            fails(lambda wrong, name: experts(**{name: wrong}), wrong, name)
    for wrong in (pack(torch.ones(2, 40, 80)), pack(torch.ones(2, 40, 8)), pack(torch.ones(2, 72, 40))):
        fails(lambda wrong: experts(down=wrong), wrong)  # reads more or less than gate and up give, or returns more
    for wrong in (scale[:1], scale.double(), scale[:, :40], torch.ones(2, 128)[:, ::2]):
        for place in range(3):
            fails(lambda scales: experts(scales=scales), [scale] * place + [wrong] + [scale] * (2 - place))
    fails(lambda: experts(scales=[scale]))
    for wrong in (2, -1, 1 << 40):
        with pytest.raises((IndexError, RuntimeError)):
            experts(chosen=torch.tensor([[0], [wrong]]))


def test_attention_refuses_arguments_that_do_not_fit():
    q, k, seen = torch.ones(2, 1, 4, 8), torch.ones(2, 3, 2, 8), torch.ones(1, 1, 1, 3).bool()
    for call in (
        lambda: one_query_attention(q, k[:, :, :0], k[:, :, :0], seen, 1.0),
        lambda: one_query_attention(q, k[:1], k, seen, 1.0),
        lambda: one_query_attention(q, k, k[:, :2], seen, 1.0),
        lambda: one_query_attention(q, k[..., :4], k, seen, 1.0),
        lambda: one_query_attention(q, k, k, seen[..., :2], 1.0),
        lambda: one_query_attention(q, k, k, seen.float(), 1.0),
        lambda: one_query_attention(q, k, k, seen[0], 1.0),
        lambda: one_query_attention(q[:, :, :3], k, k, seen, 1.0),
        lambda: one_query_attention(q[0], k, k, seen, 1.0),
        lambda: one_query_attention(q, k[0], k, seen, 1.0),
        lambda: one_query_attention(q, k, k.bfloat16(), seen, 1.0),
        lambda: one_query_attention(q.half(), k.half(), k.half(), seen, 1.0),
        lambda: one_query_attention(q, k[:, :0], k[:, :0], seen[..., :0], 1.0),
        lambda: visible_keys(torch.zeros(3, dtype=torch.long), 4),
        lambda: visible_keys(torch.zeros(1, 3, dtype=torch.int32), 4),
        lambda: visible_keys(torch.zeros(1, 3, dtype=torch.long), -4),
    ):
        fails(call)
    assert one_query_attention(q, k, k, seen, 1.0).shape == q.shape  # one mask for all sequences
    assert one_query_attention(q[:0], k[:0], k[:0], seen[:0], 1.0).shape == (0, 1, 4, 8)
