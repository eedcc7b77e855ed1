"""MINI_LLM_KERNELS=0 changes rounding and nothing else; layers are plain, and short enough to read."""

import os
import subprocess
import sys

import pytest
import torch

from model import list_models, model_file
from scripts.reading_length import reading_list
from tests.support.paths import ROOT

# Losses, gradients, logits of a forward and of decoding: fp32, packed documents, few and many tokens.
RUN = """
import sys, torch
from checks import ModelUnderTest
from model import list_models
out = {}
for name in list_models():
    model_under_test = ModelUnderTest(name)
    model, ids = model_under_test.build(), model_under_test.tokens(batch_size=3)
    model.z_loss = 0.1
    docs = (torch.arange(ids.shape[1]) // 7).expand_as(ids)
    _, loss, other_vars = model(ids, targets=ids.roll(-1, 1), doc_ids=docs)
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    with torch.no_grad():
        state = model.init_state(3)
        steps = [model(ids[:, :5], state=state)[0]]
        for i in range(5, 8):
            state.advance(5 if i == 5 else 1)
            steps.append(model(ids[:, i : i + 1], state=state)[0])
        out[name] = [loss.detach(), *other_vars.values(), *grads, model(ids)[0], *steps]
torch.save({k: [t.detach() for t in v] for k, v in out.items()}, sys.argv[1])
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{"0" and "1", of MINI_LLM_KERNELS: {model: tensors}}."""
    folder = tmp_path_factory.mktemp("dispatch")
    for kernels in "01":
        env = {**os.environ, "MINI_LLM_KERNELS": kernels, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(folder / kernels)], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return {kernels: torch.load(folder / kernels) for kernels in "01"}


@pytest.mark.parametrize("name", list_models())
def test_without_kernels_only_rounding_differs(name, results):
    for plain, fast in zip(results["0"][name], results["1"][name], strict=True):
        torch.testing.assert_close(plain, fast, rtol=1e-3, atol=1e-5)


def test_layers_have_no_case_for_compilation_or_devices():
    for path in [*(ROOT / "model/layers").glob("*.py"), *(ROOT / "model").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "is_compiling" not in text and "device.type ==" not in text, path


@pytest.mark.parametrize("name", ["mini_deepseekv3", "mini_llama3"])
def test_the_reading_length_of_an_architecture_is_bounded(name):
    lines = reading_list(model_file(name))
    assert sum(lines.values()) < 900
    assert lines[model_file(name)] <= 340
