"""check_model.py as a command, its refusal before pretraining, the shrinking of arguments, and python -m model.new."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch

import check_model
from checks import CHECKS, FAST, ModelUnderTest
from checks.harness.float64 import Float64
from checks.harness.runner import first_sentence, open_classes, run_check, usual_causes
from checks.harness.tiny_args import tiny_args
from model import ModelError
from model.new import new_file
from tests.mutants.right import RightModel, RightModelArgs, with_defaults
from tests.mutants.wrong_contract import SetsTheDefaultType
from tests.support.make_tokenizer import make_tokenizer
from tests.support.models import BASE_MODEL
from tests.support.paths import ROOT
from tests.support.token_files import pretrain_files
from utils.errors import UserError


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with four architectures more: a right one, and three ways to be wrong."""
    folder = tmp_path_factory.mktemp("project") / "project"
    hidden = shutil.ignore_patterns(".git", ".venv", "output", "tests", "__pycache__", ".*_cache", "*.md")
    shutil.copytree(ROOT, folder, ignore=hidden)
    for name in ("fine", "leaks", "crashes", "broken"):
        new_file(name, folder / "model")
    edit(folder / "model/leaks.py", "x = self.norm(x)\n", "x = self.norm(x) + 0.1 * x.roll(-1, 1)\n")
    edit(folder / "model/crashes.py", "x = self.norm(x)\n", "x = self.norm(x.T)\n")
    edit(folder / "model/broken.py", "class Block(nn.Module):", "class Block(nn.Module:")
    return folder


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def run(folder, *command):
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_right_model_passes(project):
    done = run(project, "check_model.py", "--model_name=mini_fine", "--only=contract,batch", "--json=out.json")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    results = json.loads((project / "out.json").read_text())
    assert {tuple(result) for result in results} == {("check", "status", "detail")}
    assert {result["status"] for result in results} == {"pass", "skip"} and results[0]["check"] == "contract.builds"
    assert "0 failed" in done.stdout and "batch.alone_equals_batch" in done.stdout


def test_a_failure_shows_what_was_seen_and_the_causes(project):
    done = run(project, "check_model.py", "--model_name", "mini_leaks", "--only", "later_tokens_change_nothing")
    assert done.returncode == 1
    assert "FAIL" in done.stdout and "token 1 changes the logits at the earlier positions 0" in done.stdout
    assert "likely: 1. no causal mask" in done.stdout


@pytest.mark.parametrize(
    "name, message",
    [("crashes", "model/crashes.py:{line} in forward: "), ("broken", "model/broken.py:{line}: SyntaxError: ")],
)
def test_a_file_that_breaks_is_named_by_its_line(project, name, message):
    marks = {"crashes": "self.norm(x.T)", "broken": "class Block(nn.Module:"}
    lines = (project / f"model/{name}.py").read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if marks[name] in text)
    done = run(project, "check_model.py", f"--model_name=mini_{name}", "--json=out.json")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    (result,) = json.loads((project / "out.json").read_text())
    assert (
        result["status"] == "fail"
        and result["check"] == "contract.builds"
        and message.format(line=line) in result["detail"]
    )


def test_user_errors_and_the_list(capsys):
    for flags, message in (
        (["--model_name=mini_no_such_net"], "unknown model 'mini_no_such_net'"),
        ([], "which model?"),
        ([f"--model_name={BASE_MODEL}", "--only=causalty"], "did you mean causality?"),
        ([f"--model_name={BASE_MODEL}", "--only=rows"], "the check 'rows' is called batch now: --only=batch"),
        (
            [f"--model_name={BASE_MODEL}", "--only=rows.order_does_not_matter"],
            "the check 'rows.order_does_not_matter' is called batch.order_does_not_matter now",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            check_model.main(flags)
        assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)
    check_model.main(["--list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in CHECKS)


def tokens_and_flags(project):
    if not (project / "output").exists():
        pretrain_files(project / "output/data", make_tokenizer(project / "output/tokenizer"))
    return ["--device=cpu", "--max_steps=1", "--max_batch_size=2", "--max_seq_len=32", "--sample_interval=0"]


def test_pretraining_refuses_what_is_wrong(project):
    flags = tokens_and_flags(project)
    done = run(project, "pretrain.py", "--model_name=mini_leaks", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "causality" in done.stderr and "check_model.py --model_name=mini_leaks" in done.stderr


@pytest.mark.slow
def test_skip_checks_trains_anyway(project):
    flags = tokens_and_flags(project)
    assert run(project, "pretrain.py", "--model_name=mini_leaks", "--skip_checks", *flags).returncode == 0
    assert run(project, "pretrain.py", "--model_name=mini_fine", *flags).returncode == 0


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_documents_what_how_and_why(name):
    text = CHECKS[name].__doc__
    assert "Measured:" in text and first_sentence(CHECKS[name]) and usual_causes(CHECKS[name])
    assert name not in FAST or not name.startswith("learning.")


# ------------------------------------------------------------------- shrinking


LARGE = {"vocab_size": 32000, "max_seq_len": 512, "dim": 512, "n_layers": 12, "inter_dim": 2048}
LargeModelArgs = with_defaults(RightModelArgs, **LARGE, n_heads=8, n_kv_heads=8, head_dim=64)


@dataclass
class TiedSizesModelArgs(LargeModelArgs):
    """Only heads of exactly 64, and at least one layer of each kind."""

    layer_types: list = field(default_factory=lambda: ["wide"] * 8 + ["narrow"] * 4)

    def __post_init__(self):
        if self.dim != 64 * self.n_heads or len(self.layer_types) != self.n_layers or len(set(self.layer_types)) < 2:
            raise ModelError("dim must be 64 x n_heads")


@dataclass
class DefinesTinyModelArgs(LargeModelArgs):
    @classmethod
    def tiny(cls):
        return cls(vocab_size=50, max_seq_len=16, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, inter_dim=16)


def test_common_names_are_made_small():
    args, warning = tiny_args(RightModel, LargeModelArgs)
    assert args.dim == 32 and args.n_layers == 3 and args.vocab_size == 97 and not warning
    assert args.n_heads * args.head_dim == args.dim


def test_dependent_arguments_are_made_as_small_as_they_work():
    args, warning = tiny_args(RightModel, TiedSizesModelArgs)
    assert args.n_layers == 3 and set(args.layer_types) == {"wide", "narrow"}
    assert args.inter_dim == 48 and args.dim == 512 and "dim" in warning and "tiny()" in warning


def test_the_tiny_args_of_the_author_are_used():
    assert ModelUnderTest.of(RightModel, DefinesTinyModelArgs).args == DefinesTinyModelArgs.tiny()


def test_checks_leave_the_random_generator_alone():
    tested = ModelUnderTest.of(RightModel, RightModelArgs)
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    run_check(tested, "gradients.every_parameter_learns")
    assert torch.equal(torch.rand(3), want)


def test_settings_of_torch_that_a_model_switches_are_restored():
    tested, _ = open_classes(SetsTheDefaultType, RightModelArgs)
    result = run_check(tested, "contract.nothing_is_switched")
    assert result.status == "fail" and "torch.get_default_dtype from torch.float32 to torch.float64" in result.detail
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


# ------------------------------------------------------------------- float64


def test_all_is_computed_in_float64_whatever_a_model_asks_for():
    before, low = torch.rand(3, 4), torch.rand(4, 5, dtype=torch.float64)
    with Float64():
        results = [
            before @ low,  # made outside of the block
            low.float(),
            low.to(torch.bfloat16),
            low.softmax(dim=-1, dtype=torch.float32),
            low.new_zeros(2, dtype=torch.float16),
            torch.ones(2),
            torch.arange(3, dtype=torch.float32),
            torch.cat((before, low.T[:3])),
        ]
        assert torch.view_as_complex(low[:, :2].float().contiguous()).dtype == torch.complex128
        assert before.int().dtype == torch.int32
    assert {x.dtype for x in results} == {torch.float64}
    with pytest.raises(ZeroDivisionError), Float64():
        1 / 0  # noqa: B018
    assert torch.rand(1).dtype == torch.float32


def test_without_epsilons_a_norm_cancels_a_scale():
    x = torch.rand(5, 8, dtype=torch.float64)

    def gradient(norm, **options):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        with Float64(**options):
            return torch.autograd.grad((norm(scale * x) * x).sum(), scale)[0].abs().item()

    by_hand = lambda x: x * (x.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()  # noqa: E731
    for norm in (by_hand, torch.nn.RMSNorm(8, eps=1e-6).double(), torch.nn.LayerNorm(8).double()):
        assert gradient(norm) > 1e-8 and gradient(norm, without_epsilons=True) < 1e-11


# ------------------------------------------------------------------- python -m model.new


def test_new_copies_the_template_under_the_new_name(tmp_path):
    path, model_name = new_file("my_net", tmp_path)
    text = path.read_text(encoding="utf-8")
    assert model_name == "mini_my_net" and 'model_name = "mini_my_net"' in text
    assert "class MyNetModel(" in text and "class MyNetModelArgs(" in text and "emplate" not in text
    (tmp_path / "layers").mkdir()  # a package hides the module of its name
    for taken in ("my_net", "My Net", "3d", "../x", "layers"):
        with pytest.raises(ModelError):
            new_file(taken, tmp_path)
