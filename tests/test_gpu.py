"""What only an NVIDIA GPU can show; skipped without one. benchmarks/gpu.sh runs these tests."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from checks import ModelUnderTest
from checks.harness.tiny_args import tiny_args
from engine.runs.metrics import read_metrics
from engine.training.config import TrainConfig
from engine.training.loop import train
from engine.training.step import TrainStep
from model import get_model_and_args, layers
from model.kernels.cpu_moe import looped_experts
from model.layers import moe
from tests.support.models import SHIPPED
from tests.support.packed_models import counter, flex_calls, packed_batch, small_model
from tests.support.paths import ROOT
from tests.support.small_runs import SIZES

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")


def batch_of(tested, seed=0):
    ids = tested.tokens(batch_size=4, seed=seed)
    return {"input_ids": ids, "targets": ids.roll(-1, 1)}


def make_step(model, precision, device, compile="false"):
    return TrainStep(
        model.to(device).train(), TrainConfig(precision=precision, compile=compile, max_lr=0.01), torch.device(device)
    )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("precision, least", [("fp32", 0.9999), ("bf16", 0.98)])
def test_gradients_are_those_of_the_cpu(name, precision, least):
    tested = ModelUnderTest(name)
    flat = []
    for device, kind in (("cpu", "fp32"), ("cuda", precision)):
        model = tested.build()
        make_step(model, kind, device).gradients([batch_of(tested)], [1.0], [0], 1.0)
        flat.append(torch.cat([p.grad.cpu().flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*flat, dim=0) > least


@pytest.mark.gpu
@needs_gpu
def test_grouped_experts_equal_the_loop():
    """One expert gets no tokens."""
    torch.manual_seed(0)
    shapes = (32, 64), (32, 2), (4, 48, 64), (4, 48, 64), (4, 64, 48)
    leaves = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    x, weight, *stacks = leaves
    chosen = torch.rand(32, 3, device="cuda").topk(2).indices
    grouped, load = moe.expert_swiglu(x, chosen, weight, *stacks), moe.expert_load(chosen, 4)
    outcomes = [
        [out, *torch.autograd.grad(out.square().sum(), leaves)]
        for out in (grouped, looped_experts(x, chosen, weight, load, *stacks))
    ]
    for a, b in zip(*outcomes):
        assert (a.float() - b.float()).norm() <= 0.03 * b.float().norm()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", SHIPPED)
def test_compiled_steps_learn_and_never_wait_for_the_device(name):
    """Thirty steps on one batch, as the trainer takes them; from the third on a wait inside a step is an error."""
    tested = ModelUnderTest(name)
    wide = {f.name: 48 for f in fields(tested.args) if f.name.endswith("inter_dim")}  # a width for the grouped experts
    tested.args = replace(tested.args, **wide)
    thirty_steps(tested.build(), batch_of(tested))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", SIZES)
def test_packed_steps_learn_and_never_wait_for_the_device(name):
    thirty_steps(small_model(name), packed_batch(0))


def thirty_steps(model, batch):
    trainer = make_step(model, "bf16", "cuda", compile="true")
    trainer.optimizer.set_lr(0.01)
    batch = {key: value.pin_memory() for key, value in batch.items()}
    losses = []
    try:
        for step in range(30):
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            values = trainer.gradients([batch], [1.0], [0], 1.0)
            trainer.update(trainer.clip().isfinite())
            model.after_step({name: value for name, value in values.items() if name != "loss"})
            losses.append(values["loss"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    first, last = torch.stack([losses[0], losses[-1]]).tolist()
    assert last < 0.8 * first


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("recipe", [{"optimizer": "adamw"}, {"optimizer": "muon", "ema": 0.9}])
def test_the_loop_learns_and_never_waits_for_the_device_between_log_lines(training, name, recipe):
    """Compiled, in bf16; from the third step on a wait in a step without a log line is an error."""
    Model, ModelArgs = get_model_and_args(name)
    wide = {f.name: 48 for f in fields(ModelArgs) if f.name.endswith("inter_dim")}  # a width for the grouped experts
    args = replace(tiny_args(Model, ModelArgs)[0], vocab_size=training.tokenizer.vocab_size, max_seq_len=32, **wide)

    class Watched(Model):
        def before_step(self, step, total_steps):
            super().before_step(step, total_steps)
            torch.cuda.set_sync_debug_mode("error" if step > 1 and (step + 1) % 10 else "default")

    config = TrainConfig(
        model_name=name,
        device="cuda",
        precision="bf16",
        compile="true",
        max_lr=0.01,
        log_interval=10,
        max_batch_size=4,
        accumulation_steps=2,
        max_steps=40,
        save_interval=0,
        eval_interval=0,
        sample_interval=0,
        output_path=str(training.path / "output"),
        **recipe,
    )
    try:
        run = train(config, "pretrain", Watched(args), training.tokenizer, training.sequences, training.val, "")["run"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    losses = [record["loss"] for record in read_metrics(Path(run) / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 5 and losses[-1] < 0.8 * losses[0]


DEFAULT_HEADS = {
    "mini_llama3": dict(n_heads=12, n_kv_heads=4, head_dim=64),
    "mini_deepseekv3": dict(qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("heads", ["small", "default"])
@pytest.mark.parametrize("tokens", [300, 512])
@pytest.mark.parametrize("precision, least", [("fp32", 0.9999), ("bf16", 0.99)])
def test_packed_sequences_compiled_equal_the_dense_mask(name, heads, tokens, precision, least, monkeypatch):
    """Loss and gradients, and the loss of an evaluation: compiled, in bf16 by flex_attention, against eager."""
    sizes, batch = DEFAULT_HEADS[name] if heads == "default" else {}, packed_batch(0, tokens=tokens)
    torch._dynamo.reset()
    compile, backend = torch.compile, counter("inductor")
    monkeypatch.setattr(torch, "compile", lambda model, **how: compile(model, backend=backend, **how))
    losses, flat = [], []
    for compiled in ("false", "true"):
        model = small_model(name, **sizes)
        trainer = make_step(model, precision, "cuda", compiled)
        losses.append(trainer.gradients([batch], [1.0], [0], 1.0)["loss"])
        flat.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        with torch.no_grad(), trainer.compute_dtype():
            losses.append(trainer.forward(**{key: value.cuda() for key, value in batch.items()})[1].float())
    torch.testing.assert_close(losses, losses[:1] * 4, atol=0.01, rtol=0.01)
    assert torch.cosine_similarity(*flat, dim=0) > least
    if precision == "fp32":
        assert flex_calls(backend) == 0
    elif heads == "small" and torch.cuda.get_device_capability() >= (8, 0):
        assert flex_calls(backend) == 2 * (2 + len(getattr(model, "mtp", ())))  # with gradients and without


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size, v_size", [(16, 16), (24, 16), (64, 64), (96, 64), (128, 128)])
def test_flex_attention_is_attention(size, v_size):
    """Forward and gradients of bf16, each against the dense mask in fp32, values a view into a wider tensor."""
    doc_ids, positions = packed_batch(0)["doc_ids"].cuda(), torch.arange(300, device="cuda")[None]
    torch.manual_seed(0)
    leaves = [torch.randn(3, 300, *shape, device="cuda") for shape in ((6, size), (2, size), (2, 3 * v_size))]

    def attend(q, k, v):
        mask = layers.packed_mask(positions, doc_ids=doc_ids)
        return layers.attention(q, k, v.tanh()[..., -v_size:], mask)

    outcomes = []
    for function, dtype in ((attend, torch.float32), (torch.compile(attend, dynamic=False), torch.bfloat16)):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = function(*inputs)
        outcomes.append([out, *torch.autograd.grad(out.float().sin().sum(), inputs)])
    for want, got in zip(*outcomes, strict=True):
        assert (got.float() - want).norm() < 0.02 * want.norm()


def test_gpu_sh_runs_scripts_that_exist():
    named = re.findall(r"[\w/]+\.(?:py|sh)\b", (ROOT / "benchmarks/gpu.sh").read_text(encoding="utf-8"))
    assert "tests/test_gpu.py" in named
    missing = [name for name in named if not (ROOT / name).is_file() and not (ROOT / "benchmarks" / name).is_file()]
    assert not missing
