"""docs/add_an_architecture.md, step by step: its code, inserted as described, has the described result."""

import importlib.util
import re
import sys

import pytest

from checks import CHECKS, ModelUnderTest
from checks.harness.runner import open_classes, run_check, run_checks
from model.new import new_file
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/add_an_architecture.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def replace(text, start, end, block):
    """Put `block` in place of the lines from the one that begins with `start` up to before the one with `end`."""
    a = text.index("\n" + start) + 1
    b = text.index("\n" + end, a) + 1
    return text[:a] + block + text[b:]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The file after each step of the page, as (Model, ModelArgs)."""
    idea, args, mask, flops, memory, block, model = BLOCKS
    folder = tmp_path_factory.mktemp("tutorial")
    text = new_file("my_net", folder)[0].read_text(encoding="utf-8")
    versions = {"template": text}
    text = text.replace("import RMSNorm, lm_loss", "import RMSNorm, SwiGLU, lm_loss")
    text = replace(text, "class Block", "class MyNetModel(", idea + "\n\n")
    versions["mistake"] = text = replace(text, "@dataclass", "\n", args)
    text = re.sub(r".*age\.abs\(\).*\n", lambda hit: mask, text)
    versions["right"] = text = replace(text, "    def attention_flops", "\n    # Accepting", flops)
    text = replace(text, "    def forward(self, x):\n        v =", "\n\nclass Block", memory)
    text = replace(text, "    def forward(self, x):  # (B, T, D)", "\n\nclass MyNetModel", block)
    versions["state"] = text[: text.index("\n    def forward(self, input_ids") + 1] + model
    return {name: load(folder, name, text) for name, text in versions.items()}


def load(folder, name, text):
    """Import the text as a module of the model package."""
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"model.tutorial_{name}", folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MyNetModel, module.MyNetModelArgs


def test_the_mistake_is_found_as_the_page_shows(steps):
    result = run_check(ModelUnderTest.of(*steps["mistake"]), "causality.later_tokens_change_nothing")
    assert result.status == "fail"
    assert result.detail.startswith("eval mode: token 1 changes the logits at the earlier positions 0 by up to 1.61")
    assert result.causes[0].startswith("no causal mask")


@pytest.mark.parametrize("step", ["template", "right", "state"])
def test_each_step_passes(steps, step):
    tested, _ = open_classes(*steps[step])
    names = [name for name in CHECKS if not name.startswith("precision.compiled")]
    results = {r.check: r for r in run_checks(tested, names)}
    assert not [r for r in results.values() if r.status == "fail"]
    assert results["counts.flops_are_estimated"].status == "pass"
    applies = results["state.chunks_equal_full_forward"].status, results["packing.packed_equals_separate"].status
    assert applies == (("pass", "pass") if step == "state" else ("skip", "skip"))
