"""The arithmetic of a step: low-precision copies against autocast and fp32, and what a step leaves behind."""

import json
import subprocess
import sys

import pytest
import torch

from checks import ModelUnderTest
from engine.data.sequences import PADDING
from engine.training.config import TrainConfig
from engine.training.precision import LowPrecisionCopies
from engine.training.step import TrainStep
from tests.mutants.right import RightModelArgs
from tests.mutants.wrong_learning import Fp32GateDoesNotCastItsMatrix
from tests.support.models import SHIPPED
from tests.support.paths import ROOT
from utils.errors import UserError

CPU = torch.device("cpu")


def train_step(model, precision):
    return TrainStep(model, TrainConfig(precision=precision, compile="false", optimizer="adamw"), CPU)


def gradients(name, precision, parts=1):
    """{parameter: gradient} of a step of four sequences in `parts` micro-batches, and its values."""
    tested = ModelUnderTest(name)
    model = tested.build().train()
    step = train_step(model, precision)
    ids = tested.tokens(batch_size=4)
    batches = [{"input_ids": part, "targets": part.roll(-1, 1)} for part in ids.chunk(parts)]
    values = step.gradients(batches, [1 / parts] * parts, [0] * parts, 1 / parts)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, values


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("parts", [1, 4])
def test_bf16_gradients_are_fp32_and_point_where_those_of_fp32_do(name, parts):
    want, want_values = gradients(name, "fp32")
    got, values = gradients(name, "bf16", parts)
    assert got.keys() == want.keys() and values.keys() == want_values.keys()
    torch.testing.assert_close(values["loss"], want_values["loss"], atol=0.02, rtol=0.01)
    flat = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in (got, want)]
    assert flat[0].dtype == torch.float32
    assert torch.cosine_similarity(*flat, dim=0) > 0.98


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_and_gradients_come_back(name):
    """After a step's passes the parameters are the same tensors with the same fp32 values, also when one fails."""
    model = ModelUnderTest(name).build().train()
    before = {n: (p, p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    step = train_step(model, "bf16")
    ids = ModelUnderTest(name).tokens(batch_size=2)
    step.gradients([{"input_ids": ids, "targets": ids}], [1.0], [0], 1.0)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(RuntimeError, match="stop"), step.compute_dtype():
        assert any(p.dtype == torch.bfloat16 for p in model.parameters())
        assert all(p.dtype == torch.float32 for p in model.param_groups()["scalar"])
        raise RuntimeError("stop")
    for n, p in model.named_parameters():
        assert p is before[n][0] and p.data_ptr() == before[n][1] and torch.equal(p, before[n][2])
        assert n not in grads or torch.equal(p.grad, grads[n])


def test_a_matrix_of_bf16_that_meets_fp32_is_one_line():
    """Where autocast is off a weight is what it is, and autocast alone would leave it fp32."""
    tested = ModelUnderTest.of(Fp32GateDoesNotCastItsMatrix, RightModelArgs)
    model, ids = tested.build().train(), tested.tokens(batch_size=2)
    with pytest.raises(UserError, match=r"weight\.float"):
        train_step(model, "bf16").gradients([{"input_ids": ids, "targets": ids}], [1.0], [0], 1.0)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_sums_of_many_backward_passes_keep_their_digits():
    """1 + 256 times 2^-8: in bf16 the sum would stay 1."""
    param = torch.nn.Parameter(torch.ones(3))
    low = LowPrecisionCopies([param], torch.bfloat16)
    with low.cast_weights():
        for factor in [1.0] + [2.0**-8] * 256:
            (param * factor).sum().backward()
            low.collect()
    assert torch.equal(param.grad, torch.full((3,), 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_compile_nothing_after_the_first(name, precision, monkeypatch):
    """Packed sequences whose documents (and expert loads) differ from step to step, under one compiled model."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: compile(model, backend="aot_eager", **how))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tested = ModelUnderTest(name)
    model = tested.build().train()
    step = TrainStep(model, TrainConfig(precision=precision, compile="true"), CPU)
    graphs = []
    for index in range(20):
        ids = tested.tokens(batch_size=4, seed=index)
        starts = torch.rand(ids.shape, generator=torch.Generator().manual_seed(index)) < 0.2
        padding = torch.arange(ids.shape[1]) >= ids.shape[1] - index % 4
        documents = starts.cumsum(dim=1).masked_fill(padding, PADDING)
        batch = {"input_ids": ids, "targets": ids.roll(-1, 1), "doc_ids": documents}
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            values = step.gradients([batch], [1.0], [0], 1.0)
        step.update(step.clip().isfinite())
        model.after_step({name: value for name, value in values.items() if name != "loss"})
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[0] > 0 and graphs == [graphs[0]] * 20


@pytest.mark.slow
def test_the_speed_benchmark_runs(tmp_path):
    """benchmarks/train.py at tiny sizes: both models, both sides, equal losses, memory. Compiling takes minutes."""
    arguments = [
        sys.executable,
        str(ROOT / "benchmarks/train.py"),
        "--quick",
        "--compiled=false",
        f"--results={tmp_path}/train.json",
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "train.json").read_text())
    assert len(results["speed"]) == 4 and all(row["ratio_eager"] > 0 for row in results["speed"].values())
    assert all(0 < figures["share"] for figures in results["memory"].values())
    assert all(row["ratio"] > 0 for row in results["packed"].values()) and len(results["packed"]) == 1
