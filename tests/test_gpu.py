"""What only an NVIDIA GPU can show; skipped without one. benchmarks/gpu.sh runs these tests."""

import subprocess
from dataclasses import fields, replace

import pytest
import torch
from engine_helpers import ROOT

from checks import Subject
from engine.config import TrainConfig
from engine.step import Stepper
from model import experts, list_models

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")


def batch_of(subject, seed=0):
    ids = subject.tokens(rows=4, seed=seed)
    return {"input_ids": ids, "targets": ids.roll(-1, 1)}


def stepper_of(model, precision, device, compile="false"):
    return Stepper(model.to(device).train(), TrainConfig(precision=precision, compile=compile, max_lr=0.01),
                   torch.device(device))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("precision, least", [("fp32", 0.9999), ("bf16", 0.98)])
def test_gradients_are_those_of_the_cpu(name, precision, least):
    subject = Subject(name)
    flat = []
    for device, kind in (("cpu", "fp32"), ("cuda", precision)):
        model = subject.build()
        stepper_of(model, kind, device).gradients([batch_of(subject)], [1.0], [0], 1.0)
        flat.append(torch.cat([p.grad.cpu().flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*flat, dim=0) > least


@pytest.mark.gpu
@needs_gpu
def test_grouped_experts_equal_the_loop():
    """An expert without rows among them."""
    counts = torch.tensor([5, 0, 19, 8], device="cuda")
    torch.manual_seed(0)
    x, weight = torch.randn(32, 64, device="cuda"), torch.randn(4, 48, 64, device="cuda")
    outcomes = []
    for matmul in (experts.expert_matmul, experts._expert_loop):
        leaves = [t.bfloat16().requires_grad_() for t in (x, weight)]
        out = matmul(*leaves, counts)
        outcomes.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*outcomes, atol=0.1, rtol=0.02)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", list_models())
def test_compiled_steps_learn_and_never_wait_for_the_device(name):
    """Thirty steps on one batch, as the trainer takes them; from the third on a wait inside a step is an error."""
    subject = Subject(name)
    wide = {f.name: 48 for f in fields(subject.args) if f.name.endswith("inter_dim")}  # a width for the grouped experts
    subject.args = replace(subject.args, **wide)
    model = subject.build()
    stepper = stepper_of(model, "bf16", "cuda", compile="true")
    stepper.optimizer.set_lr(0.01)
    batch = {key: value.pin_memory() for key, value in batch_of(subject).items()}
    losses = []
    try:
        for step in range(30):
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            values = stepper.gradients([batch], [1.0], [0], 1.0)
            stepper.clip()
            stepper.update()
            model.after_step({name: value for name, value in values.items() if name != "loss"})
            stepper.optimizer.zero_grad()
            losses.append(values["loss"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    first, last = torch.stack([losses[0], losses[-1]]).tolist()
    assert last < 0.8 * first


def test_gpu_sh_is_a_shell_script():
    assert subprocess.run(["bash", "-n", str(ROOT / "benchmarks/gpu.sh")]).returncode == 0
