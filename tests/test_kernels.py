"""The kernels of a decoding step on a processor, beside the formulas in float64."""

import copy
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from engine.inference.compile import with_kernels
from engine.inference.generate import generate
from model.kernels import decode
from model.kernels.decode import Packed, PackedLinear, PackedSwiGLU, one_query_attention, pack, packed_experts
from model.kernels.int8 import Int8Weight, to_int8
from model.layers import SwiGLU, attention_mask
from tests.support.decoding_models import PROMPTS, TOKENIZER, bf16, build
from tests.support.models import SHIPPED

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # of one result; sums are fp32


@pytest.fixture(autouse=True)
def loaded():
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("needs a C++ compiler")
    decode.load()
    torch.manual_seed(0)


def held(weight, precision):
    """A weight (..., F, D) as a model holds it, and what it stands for, float64."""
    if precision == "int8":
        weight = Int8Weight(weight.bfloat16())
        return weight, weight.q.double() * weight.scale.double()[..., None]
    weight = weight.to(getattr(torch, precision))
    return weight, weight.double()


def inputs(*sizes, precision):
    return torch.randn(sizes, dtype=torch.float32 if precision == "float32" else torch.bfloat16)


def assert_near(got, exact, of, times=1):
    """Within the rounding of numbers of the size `of`, the sum of the magnitudes that were added up."""
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= times * ROUNDING[got.dtype] * of).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("n_outputs, n_inputs", [(64, 32), (37, 51), (1, 1), (32, 130), (200, 7)])
@pytest.mark.parametrize("rows", [(1,), (2,), (3, 1), (8,), (2, 9), (0,)])
def test_a_product(precision, n_outputs, n_inputs, rows):
    weight, exact = held(torch.randn(n_outputs, n_inputs) * torch.logspace(-3, 3, n_outputs)[:, None], precision)
    x = inputs(*rows, n_inputs, precision=precision)
    assert_near(Packed.of(weight)(x), x.double() @ exact.T, x.double().abs() @ exact.abs().T)


def test_a_product_of_rows_that_are_not_contiguous():
    weight, x = torch.randn(40, 16), torch.randn(16, 3).T
    torch.testing.assert_close(Packed.of(weight)(x), x @ weight.T)


def test_numbers_that_are_not_finite_stay_so():
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
@pytest.mark.parametrize("n_rows", [1, 8, 21])
def test_chosen_experts(precision, n_experts, width, dim, active, n_rows):
    shapes = (n_experts, width, dim), (n_experts, width, dim), (n_experts, dim, width)
    stacks, exact = zip(*(held(torch.randn(shape) * dim**-0.5, precision) for shape in shapes))
    x = inputs(n_rows, dim, precision=precision)
    chosen = torch.stack([torch.randperm(n_experts)[:active] for _ in range(n_rows)])
    got = packed_experts(x, chosen, *(Packed.of(stack) for stack in stacks))
    assert got.shape == (n_rows, active, dim)
    for row, experts, outs in zip(x.double(), chosen.tolist(), got):
        for expert, out in zip(experts, outs):
            gate, up, down = (stack[expert] for stack in exact)
            hidden = F.silu(gate @ row) * (up @ row)
            assert_near(out, down @ hidden, down.abs() @ ((gate.abs() @ row.abs() + 1) * (up.abs() @ row.abs())), 3)


def test_an_expert_that_does_not_exist_is_an_error():
    stack = Packed.of(torch.ones(2, 4, 4))
    for wrong in (2, -1):
        with pytest.raises((IndexError, RuntimeError)):
            packed_experts(torch.ones(1, 4), torch.tensor([[wrong]]), stack, stack, stack)


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
    rows, scale = 3, k_dim**-0.5
    q = torch.randn(rows, 1, heads, k_dim).mul(3).to(dtype)
    cache = torch.randn(rows, n_keys + 5, groups, k_dim + v_dim).to(dtype)
    mask = torch.arange(n_keys) < torch.tensor([n_keys, 1 + n_keys // 2, 1])[:, None]
    mask = mask[:, None, None]
    cache[~F.pad(mask[:, 0, 0], (0, 5))] = float("nan")  # leftovers behind what a row has seen
    k, v = cache[:, :n_keys].split((k_dim, v_dim), dim=-1)
    got = one_query_attention(q, k, v, mask, scale)
    seen = mask[:, 0, 0, :, None, None]
    exact = exact_attention(q, k.where(seen, 0), v.where(seen, 0), mask, scale)
    assert_near(got, exact, exact_attention(q, k.where(seen, 0), v.where(seen, 0).abs(), mask, scale), 3)


def test_attention_passes_over_keys_hidden_in_the_middle():
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 300, 2, 16), torch.randn(2, 300, 2, 16)
    mask = torch.rand(2, 1, 1, 300) < 0.3
    mask[..., :130] = False  # whole tiles, the first among them
    torch.testing.assert_close(
        one_query_attention(q, k, v, mask, 1.0).double(), exact_attention(q, k, v, mask, 1.0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hidden_key_of_infinite_score_is_not_seen(dtype):
    q, k = torch.ones(1, 1, 1, 16), torch.tensor([float("inf"), 0, 1]).view(1, 3, 1, 1).expand(1, 3, 1, 16).contiguous()
    v, mask = torch.randn(1, 3, 1, 16), torch.tensor([False, True, True]).view(1, 1, 1, 3)
    got = one_query_attention(*(x.to(dtype) for x in (q, k, v)), mask, 1.0)
    assert_near(got, exact_attention(q, k, v.to(dtype), mask, 1.0), v.double().abs().amax(1, keepdim=True), 3)
    alone = k[:, :1].neg()
    assert one_query_attention(q, alone, v[:, :1], mask[..., 1:2], 1.0).isnan().all()  # as softmax has it


def test_attention_keeps_its_digits_where_scores_are_far_apart():
    q, k = torch.full((1, 1, 1, 4), 10.0), torch.linspace(-30, 30, 200).view(1, 200, 1, 1).expand(1, 200, 1, 4)
    v, mask = torch.randn(1, 200, 1, 4), torch.ones(1, 1, 1, 200, dtype=torch.bool)
    got = one_query_attention(q, k, v, mask, 1.0)  # scores from -1200 to 1200
    torch.testing.assert_close(got.double(), exact_attention(q, k, v, mask, 1.0), rtol=1e-4, atol=1e-5)


def test_visible_keys_are_those_up_to_the_position():
    positions = torch.tensor([[3, 4], [0, 1], [70, 71]]).T.contiguous().T  # not in order in memory
    want = (torch.arange(72) <= positions[..., None])[:, None]
    assert torch.equal(decode.visible_keys(positions, 72), want)
    assert torch.equal(decode.visible_keys(positions, 50), want[..., :50])
    assert decode.visible_keys(positions[:0], 50).shape == (0, 1, 2, 50)
    torch.library.opcheck(torch.ops.mini_llm.visible, (positions, 72), test_utils="test_faketensor")


@torch.no_grad()
def test_a_compiled_mask_is_the_mask():
    decode.load()
    compiled = torch.compile(attention_mask, backend="eager", fullgraph=True)
    for positions in torch.tensor([[3], [0], [9]]), torch.tensor([[9]]), torch.tensor([[2]], dtype=torch.int32):
        state = SimpleNamespace(max_pos=9)
        assert torch.equal(compiled(positions, state), attention_mask(positions, state))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_product(threads):
    before = torch.get_num_threads()
    weight, x = torch.randn(100, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    want = Packed.of(weight)(x)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(Packed.of(weight)(x), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", [*SHIPPED, "Recurrent", "Hybrid"])
@pytest.mark.parametrize("at_8_bits", [False, True])
@torch.no_grad()
def test_a_model_by_the_kernels_is_the_model(name, at_8_bits):
    """On the same weights, which it leaves alone; reading whole prompts and one token after another."""
    model = to_int8(bf16(build(name))) if at_8_bits else build(name)
    before = copy.deepcopy(model.state_dict())
    program, ids = with_kernels(model), torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    assert any(isinstance(module, (PackedLinear, PackedSwiGLU, Packed)) for module in program.modules())
    assert not any(isinstance(module, (PackedLinear, PackedSwiGLU, Packed)) for module in model.modules())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in before.items())
    want, got = (one(ids)[0].float() for one in (model, program))
    assert (got - want).norm() < (0.05 if at_8_bits else 1e-5) * want.norm()
    if not at_8_bits:
        plain = generate(model, TOKENIZER, PROMPTS, 12, stop_ids=(), temperature=0)
        assert generate(program, TOKENIZER, PROMPTS, 12, stop_ids=(), temperature=0) == plain


def test_a_linear_keeps_its_bias_and_shows_its_weight():
    linear = torch.nn.Linear(40, 24).bfloat16()
    x = torch.randn(1, 3, 40).bfloat16()
    program = with_kernels(torch.nn.Sequential(linear))
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    torch.testing.assert_close(program(x).double(), exact, rtol=0.02, atol=0.02)
    assert program[0].weight is linear.weight


class Twice(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_not_plain_stays_as_it_is():
    """A subclass, within a SwiGLU too, and whoever has a hook."""
    model = torch.nn.Sequential(SwiGLU(8, 16), SwiGLU(8, 16), SwiGLU(8, 16), torch.nn.Linear(8, 8), Twice(8, 8))
    model[0].down_proj = Twice(16, 8, bias=False)
    model[1].register_forward_hook(lambda module, given, out: out + 1)
    model[2].up_proj.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    model[3].register_forward_hook(lambda module, given, out: out * 3)
    program, x = with_kernels(model), torch.randn(5, 8)
    torch.testing.assert_close(program(x), model(x))
    assert [type(module) for module in program] == [SwiGLU, SwiGLU, SwiGLU, torch.nn.Linear, Twice]
    assert type(program[0].gate_proj) is type(program[1].gate_proj) is PackedLinear
    assert program[0].gate_proj.out_features == 16 and program[0].gate_proj.bias is None


def test_stacks_of_different_types_stay_as_they_are():
    module = torch.nn.Module()
    module.expert_weights = ("a", "b")
    module.a, module.b = (torch.nn.Parameter(torch.ones(2, 4, 4, dtype=t)) for t in (torch.float32, torch.bfloat16))
    assert isinstance(with_kernels(module).a, torch.nn.Parameter)


def test_types_without_a_kernel_stay_as_they_are():
    for other in (torch.float16, torch.float64):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), SwiGLU(8, 16)).to(other)
        program = with_kernels(model)
        assert type(program[0]) is torch.nn.Linear and type(program[1]) is SwiGLU
        x = torch.randn(2, 8).to(other)
        assert torch.equal(program(x), model(x))
    mixed = torch.nn.Sequential(SwiGLU(8, 16))
    mixed[0].down_proj.double()
    program = with_kernels(mixed)
    assert type(program[0]) is SwiGLU and type(program[0].gate_proj) is PackedLinear
    assert type(program[0].down_proj) is torch.nn.Linear


def test_packing_loses_nothing():
    for dtype, per_step in decode.PER_STEP.items():
        weight = torch.randint(-100, 100, (3, 37, 51)).to(dtype)
        packed = pack(weight)
        assert packed.shape == (3, 2, -(-51 // per_step), 32, per_step)
        back = packed.transpose(-3, -2).flatten(-2).flatten(1, 2)
        assert torch.equal(back[:, :37, :51], weight)
        assert not back[:, 37:].any() and not back[..., 51:].any()


RUN = "from model.kernels import decode; decode.load()"


def test_without_a_compiler_it_is_one_line(tmp_path):
    """And what a killed or failed compilation leaves is no library."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "false"}
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True)
    assert done.returncode and "ModelError" in done.stderr.splitlines()[-1] and "CXX" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "mini_llm").iterdir())
    for more, said in (
        ({"PATH": str(tmp_path)}, "install g++"),
        ({"XDG_CACHE_HOME": __file__}, "XDG_CACHE_HOME"),
        ({"CXX": "no-such-compiler -x"}, "no such program"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", RUN], env={**environment, "CXX": "", **more}, capture_output=True, text=True
        )
        assert "ModelError" in done.stderr.splitlines()[-1] and said in done.stderr.splitlines()[-1]


def test_two_processes_may_compile_at_once(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", RUN], env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert [path.suffix for path in (tmp_path / "mini_llm").iterdir()] == [".so"]


def test_what_does_not_fit_is_an_error():
    """Nothing is read that is not there."""
    packed, stack, seen = Packed.of(torch.ones(4, 4)), Packed.of(torch.ones(2, 4, 4)), torch.ones(1, 1, 1, 3).bool()
    q, k = torch.ones(2, 1, 4, 8), torch.ones(2, 3, 2, 8)
    for call in (
        lambda: packed(torch.ones(1, 4).bfloat16()),
        lambda: packed(torch.ones(1, 5)),
        lambda: packed(torch.ones(1, 3)),
        lambda: packed_experts(torch.ones(2, 4), torch.zeros(3, 1, dtype=torch.long), stack, stack, stack),
        lambda: packed_experts(torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.long), stack, stack, packed),
        lambda: packed_experts(
            torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.long), stack, stack, Packed.of(torch.ones(2, 4, 40))
        ),
        lambda: one_query_attention(q, k[:, :, :0], k[:, :, :0], seen, 1.0),
        lambda: one_query_attention(q, k[:1], k, seen, 1.0),
        lambda: one_query_attention(q, k, k[:, :2], seen, 1.0),
        lambda: one_query_attention(q, k[..., :4], k, seen, 1.0),
        lambda: one_query_attention(q, k, k, seen[..., :2], 1.0),
        lambda: one_query_attention(q[:, :, :3], k, k, seen, 1.0),
    ):
        with pytest.raises(RuntimeError):
            call()
    assert one_query_attention(q, k, k, seen, 1.0).shape == q.shape  # one mask for all rows
    assert one_query_attention(q[:0], k[:0], k[:0], seen[:0], 1.0).shape == (0, 1, 4, 8)
