"""Flat configs: types, precedence, suggestions, help."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from utils import files
from utils.config import check_bounds, opt, parse
from utils.errors import UserError, run_script


@dataclass
class ToyArgs:
    vocab_size: int = 8
    max_seq_len: int = 16
    n_layers: int = 2
    rope_theta: float = 1e4
    kinds: tuple[str, ...] = ("a", "b")


@dataclass
class ToyConfig:
    """A toy."""

    model_name: str = opt("toy", "which model")
    model: dict = opt({}, "architecture")
    max_lr: float = opt(0.1, "peak rate", group="Optimizer")
    steps: int = opt(5, "how many")
    verbose: bool = opt(False, "log more")
    compile: str = opt("auto", "compile", choices=("auto", "true", "false"))
    betas: tuple[float, float] = opt((0.9, 0.95), "moments")
    limit: int | None = opt(None, "perhaps a limit")


def toy(*argv):
    return parse(ToyConfig, list(argv), lambda name: ToyArgs)


def test_types_and_forms():
    config = toy("--max_lr=1e-3", "--steps", "1_000", "--verbose", "--compile", "--betas=0.8,0.99", "--limit=3")
    assert (config.max_lr, config.steps, config.verbose, config.compile) == (1e-3, 1000, True, "true")
    assert config.betas == (0.8, 0.99) and config.limit == 3
    assert toy("--steps=1e6").steps == 1_000_000
    assert toy("--no_verbose").verbose is False and toy("--no_compile").compile == "false"
    assert toy("--verbose=false").verbose is False and toy("--compile=auto").compile == "auto"
    assert toy("--limit=none").limit is None
    assert toy("--max_lr", "-0.5").max_lr == -0.5  # a value may begin with one dash


def test_precedence_and_model_fields(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("max_lr: 1e-2\nsteps: 7\ncompile: true\nmodel:\n  n_layers: 3\n  rope_theta: 5e5\n")
    config = toy("--config", str(preset), "--steps=9", "--model.n_layers=4", "--model.kinds=x,y,z")
    assert (config.max_lr, config.steps, config.compile) == (1e-2, 9, "true")
    assert config.model == {"n_layers": 4, "rope_theta": 5e5, "kinds": ("x", "y", "z")}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--max_rl=1"], "did you mean --max_lr?"),
        (["--max-lr=1"], "did you mean --max_lr?"),
        (["--model.n_layer=1"], "did you mean --model.n_layers?"),
        (["--steps=1.5"], "--steps=1.5: expected int"),
        (["--steps=many"], "expected int"),
        (["--steps=inf"], "expected int"),
        (["--max_lr=nan"], "--max_lr=nan: expected float"),
        (["--verbose=perhaps"], "expected bool"),
        (["--betas=0.9"], "--betas=0.9: expected"),
        (["--compile=fast"], "expected one of auto, true, false"),
        (["--steps"], "--steps needs a value"),
        (["steps=3"], "settings are written --key=value"),
        (["--model.vocab_size=3"], "comes from the tokenizer"),
        (["--config=nowhere.yaml"], "no config file nowhere.yaml"),
        (["--model=3"], "unknown setting --model"),
    ],
)
def test_errors_are_one_line(argv, message):
    with pytest.raises(UserError) as caught:
        toy(*argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["x,y", "[x, y]", "('x', 'y')", '["x", "y"]', "('x', 'y',)"])
def test_a_list_as_python_or_json_writes_it(text):
    assert toy(f"--model.kinds={text}").model["kinds"] == ("x", "y")


def test_preset_errors(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("max_rl: 1\n")
    with pytest.raises(UserError, match="did you mean --max_lr"):
        toy(f"--config={preset}")
    preset.write_bytes("# 笔记\nmax_lr: 1\n".encode("gbk"))
    with pytest.raises(UserError, match="not UTF-8"):
        toy(f"--config={preset}")
    preset.write_text("a: [1\n")
    with pytest.raises(UserError, match="not valid YAML") as caught:
        toy(f"--config={preset}")
    assert "\n" not in str(caught.value)


def test_bounds_are_checked_and_named():
    @dataclass
    class Bounded:
        share: float = opt(0.5, "a share", gt=0, le=1)
        betas: tuple[float, float] = opt((0.9, 0.95), "moments", ge=0, lt=1)

    check_bounds(Bounded(share=1.0, betas=(0.0, 0.99)))
    with pytest.raises(UserError, match="--share=0: must be above 0 and at most 1"):
        check_bounds(Bounded(share=0))
    with pytest.raises(UserError, match="--betas=.0.9, 1.0.: must be at least 0 and below 1"):
        check_bounds(Bounded(betas=(0.9, 1.0)))


def test_help_lists_everything(capsys):
    with pytest.raises(SystemExit) as ended:
        toy("--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for part in ("--max_lr=0.1", "peak rate", "--betas=0.9,0.95", "--model.n_layers=2", "[auto|true|false]"):
        assert part in text
    assert text.index("--model_name") < text.index("Optimizer:") < text.index("--max_lr")


def test_run_script_prints_one_line(capsys):
    def fails():
        raise UserError("no such file: make it")

    with pytest.raises(SystemExit) as ended:
        run_script(fails)
    assert ended.value.code == 2 and capsys.readouterr().err == "error: no such file: make it\n"
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: Path(__file__, "below_a_file").mkdir())
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="a bug"):  # anything else keeps its traceback
        run_script(lambda: (_ for _ in ()).throw(ValueError("a bug")))


def test_output_lies_in_the_project_wherever_the_command_is_typed(tmp_path, monkeypatch):
    @dataclass
    class Paths:
        data_path: str = opt("output/data", "where", path=True)
        name: str = opt("output/x", "no path")

    monkeypatch.setattr(files, "PROJECT", tmp_path)
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(Paths, []).data_path == "output/data"  # in the project itself a path stays as it was typed
    monkeypatch.chdir("deep")
    assert parse(Paths, []).data_path == str(tmp_path / "output/data")
    for mine in ("outputs/data", "../output/data", "data", str(tmp_path / "elsewhere"), ""):
        assert parse(Paths, [f"--data_path={mine}"]).data_path == mine
    assert parse(Paths, []).name == "output/x"
    (tmp_path / "output").mkdir()
    (tmp_path / "output/preset.yaml").write_text("data_path: output/mine")
    assert parse(Paths, ["--config=output/preset.yaml"]).data_path == str(tmp_path / "output/mine")
