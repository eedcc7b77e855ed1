"""int8 weights: near the original weights, in every kind of module."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from checks import ModelUnderTest
from engine.inference.chat import open_chat_model
from engine.inference.generate import generate
from engine.runs import registry
from model import BaseModelArgs
from model.kernels.int8 import FEW_TOKENS, Int8Linear, Int8Weight, to_int8
from model.kernels.moe import chosen_matmul, expert_matmul
from tests.mutants.right import RightModelArgs
from tests.mutants.wrong_learning import Fp32GateDoesNotCastItsMatrix
from tests.support.decoding_models import PROMPTS, TOKENIZER, NoState, V, bf16, build
from tests.support.models import SHIPPED
from utils.errors import UserError

EVERY = [*SHIPPED, "Recurrent", "Hybrid", "no state"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_matmuls_are_those_of_the_dequantized_weight(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 48, 64, generator=generator) * torch.logspace(-3, 1, 48)[:, None]
    weight[2, 7] = 0
    held = Int8Weight(weight.to(dtype))
    scale = weight.to(dtype).float().abs().amax(-1, keepdim=True) / 127
    tolerance = scale * (0.501 if dtype == torch.float32 else 1.1)  # bf16: the scale is rounded too
    assert ((held.dequantized().float() - weight.to(dtype).float()).abs() <= tolerance).all()
    exact, rounding = held.q.double() * held.scale.double()[..., None], 1e-6 if dtype == torch.float32 else 1e-2

    def check(x, expert, out):
        """Within the rounding of sums of that size."""
        bound = rounding * (exact[expert].abs() @ x.double().abs())
        assert ((out.double() - exact[expert] @ x.double()).abs() <= bound).all()

    for tokens in (1, FEW_TOKENS, FEW_TOKENS + 1):
        x = torch.randn(tokens, 64, generator=generator).to(dtype)
        for token, out in zip(x, held.linear(x, 3)):
            check(token, 3, out)
    x, chosen = torch.randn(6, 64, generator=generator).to(dtype), torch.tensor([[0, 3], [3, 4], [1, 1]])
    for stack in (held, held.dequantized()):
        for token, experts, outs in zip(x, chosen.tolist(), chosen_matmul(x[:3, None], stack, chosen)):
            for expert, out in zip(experts, outs):
                check(token, expert, out)
    outs = expert_matmul(x, held, torch.tensor([1, 0, 3, 2, 0]))
    for token, expert, out in zip(x, (0, 2, 2, 2, 3, 3), outs, strict=True):
        check(token, expert, out)


@pytest.mark.parametrize("width", (1, 8, 17, 24, 37, 40))
def test_tokens_of_any_width_are_multiplied(width):
    generator = torch.Generator().manual_seed(0)
    held = Int8Weight(torch.randn(5, width, generator=generator).bfloat16())
    x = torch.randn(FEW_TOKENS, width, generator=generator).bfloat16()
    torch.testing.assert_close(
        held.linear(x).double(), x.double() @ held.dequantized().double().T, rtol=0.03, atol=0.03
    )


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_an_int8_model_is_near_the_model(name):
    model = build(name)
    exact, held = copy.deepcopy(model), to_int8(model)
    ids = torch.tensor([PROMPTS[2]])
    logs, near, in_bf16 = (
        one(ids)[0].float().log_softmax(-1) for one in (exact, held, to_int8(bf16(copy.deepcopy(exact))))
    )
    for other in (near, in_bf16):
        # the median: a tie of two experts, rounded, sends a token to the other one
        assert 0 < (logs.exp() * (logs - other)).sum(-1).median() < 0.05
    assert any(isinstance(module, Int8Linear) for module in held.modules())
    stacked = {name for module in held.modules() for name in getattr(module, "expert_weights", ())}
    assert not any(name.rpartition(".")[2] in stacked for name, _ in held.named_parameters())
    assert generate(held, TOKENIZER, PROMPTS, 12, stop_ids=(), temperature=0) == [
        generate(held, TOKENIZER, [prompt], 12, stop_ids=(), temperature=0)[0] for prompt in PROMPTS
    ]


class ReadsItsWeight(NoState):
    def forward(self, input_ids, targets=None):
        logits = super().forward(input_ids)[0]
        return logits + F.linear(F.linear(logits, self.lm_head.weight.T), self.lm_head.weight), None, {}


def test_a_linear_whose_weight_the_model_reads_stays_as_it_is():
    model = ReadsItsWeight(BaseModelArgs(V, 48))
    model.more = torch.nn.Linear(4, 4)
    to_int8(model)
    assert type(model.lm_head) is torch.nn.Linear and type(model.more) is Int8Linear
    assert type(model.tok_embed) is torch.nn.Embedding
    assert model(torch.tensor([[1, 2]]))[0].requires_grad and model.more(torch.ones(1, 4)).shape == (1, 4)


@pytest.mark.parametrize("precision", ("bf16", "int8"))
def test_a_model_that_mixes_dtypes_is_one_line(precision, monkeypatch):
    model = bf16(ModelUnderTest.of(Fp32GateDoesNotCastItsMatrix, RightModelArgs).build().eval())
    run = registry.LoadedRun(model, TOKENIZER, {"stage": "sft"}, Path("run"), Path("run/final"), "")
    monkeypatch.setattr(registry, "load_run", lambda *_, **__: run)
    with pytest.raises(UserError, match="--precision=fp32"):
        open_chat_model("run", "cpu", precision)


def test_an_expert_of_a_stack_is_its_dequantized_weight():
    stack = Int8Weight(torch.randn(3, 8, 16))
    assert all(torch.equal(stack[expert], weight) for expert, weight in enumerate(stack.dequantized()))
