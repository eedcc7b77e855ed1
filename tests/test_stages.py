"""pretrain.py and sft.py as commands: end to end on tiny data, and one line for each user error."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import uvicorn

import pretrain
import serve
import sft
from engine.runs import checkpoint
from engine.runs.registry import find_runs, load_run, newest_run
from model import ModelError
from tests.support.models import BASE_MODEL
from tests.support.paths import ROOT
from tests.support.token_files import stage_files
from utils import files
from utils.errors import UserError

NAME = BASE_MODEL
SMALL = [
    "--device=cpu",
    "--max_batch_size=2",
    "--max_steps=2",
    "--sample_interval=0",
    "--eval_interval=0",
    "--model.dim=32",
    "--model.n_layers=2",
    "--max_seq_len=48",
    "--skip_checks",
]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A working folder with tokenizer, data, and one pretraining run."""
    folder = tmp_path_factory.mktemp("stages")
    stage_files(folder / "output")
    before, project = os.getcwd(), files.PROJECT
    os.chdir(folder)
    files.PROJECT = folder  # where output/ lies
    pretrain.main([f"--model_name={NAME}", *SMALL])
    yield folder
    os.chdir(before)
    files.PROJECT = project


def test_from_pretraining_to_a_loaded_chat_model(stages):
    summary = sft.main([f"--model_name={NAME}", *SMALL[:5]])
    assert summary["run"] == f"output/sft_{NAME}" and summary["status"] == "finished"
    for dtype in (torch.float32, torch.bfloat16):
        run = load_run(f"output/sft_{NAME}", dtype=dtype)
        model, tokenizer, config = run.model, run.tokenizer, run.config
        assert not model.training and config["stage"] == "sft" and config["model"]["dim"] == 32
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert all(b.dtype != torch.bfloat16 for b in model.buffers())
        logits, loss, _ = model(torch.tensor([[tokenizer.bos_id, 20]]))
        assert logits.shape == (1, 2, tokenizer.vocab_size) and loss is None
    assert {run.stage for run in find_runs()} == {"pretrain", "sft"}
    assert str(newest_run("output", "pretrain", NAME)) == f"output/pretrain_{NAME}"
    assert json.loads((stages / f"output/sft_{NAME}/run.json").read_text())["identity"]["init_weights"]


def test_a_dry_run_writes_nothing(stages, capsys):
    before = {path: path.stat().st_mtime_ns for path in stages.rglob("*")}
    for about in (
        pretrain.main([f"--model_name={NAME}", *SMALL, "--dry_run", "--write_run_path=run_path"]),
        sft.main([f"--model_name={NAME}", *SMALL[:5], "--dry_run", "--max_batch_size=0", "--global_batch_size=2"]),
    ):
        assert about["steps"] == 2 and 0 < about["memory"]["predicted"]
    assert {path: path.stat().st_mtime_ns for path in stages.rglob("*")} == before
    out = capsys.readouterr().out
    assert f"pretrain {NAME}\n  parameters" in out and f"sft {NAME}\n  parameters" in out


def test_a_run_can_move(stages, tmp_path):
    shutil.copytree(stages / f"output/pretrain_{NAME}", tmp_path / "elsewhere")
    load_run(tmp_path / "elsewhere")
    sft.main([f"--init_from={tmp_path / 'elsewhere'}", *SMALL[:5], f"--output_path={tmp_path}"])
    assert (tmp_path / f"sft_{NAME}" / "final").is_dir()


def test_a_checkpoint_can_be_named_instead_of_its_run(stages, tmp_path, capsys):
    run = shutil.copytree(stages / f"output/pretrain_{NAME}", tmp_path / "run")
    step = run / "checkpoints/step-00000002"
    newest = load_run(run)
    named = load_run(step)
    final = load_run(run / "final")
    assert (newest.path, named.path) == (run, run) and (newest.checkpoint, named.checkpoint) == (run / "final", step)
    for name, value in newest.model.state_dict().items():
        assert torch.equal(value, named.model.state_dict()[name])
        assert torch.equal(value, final.model.state_dict()[name])
    sft.main([f"--init_from={step}", *SMALL[:5], f"--output_path={tmp_path}"])
    assert "has not finished" not in capsys.readouterr().err
    (step / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged, model.safetensors is not as it was written"):
        load_run(step)
    shutil.rmtree(run / "final")
    with pytest.raises(UserError, match="run has no valid checkpoint"):
        load_run(run)


@pytest.mark.parametrize("command", ("load_run", "sft", "serve"))
def test_the_weights_are_hashed_once_a_start(stages, command, tmp_path, monkeypatch):
    run = stages / f"output/pretrain_{NAME}"
    hashed = []
    sha256 = checkpoint.file_sha256
    monkeypatch.setattr(checkpoint, "file_sha256", lambda path: hashed.append(Path(path).resolve()) or sha256(path))
    if command == "load_run":
        assert load_run(run).fingerprint == sha256(run / "final/model.safetensors")
    elif command == "sft":
        sft.main([f"--init_from={run}", *SMALL[:5], f"--output_path={tmp_path}"])
    else:
        monkeypatch.setattr(sys, "argv", ["serve.py", f"--run={run}", "--port=0", "--device=cpu"])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
        serve.main()
    assert hashed.count(run / "final/model.safetensors") == 1


def test_a_run_that_was_tampered_with_is_refused(stages, tmp_path):
    run = shutil.copytree(stages / f"output/pretrain_{NAME}", tmp_path / "run")
    with open(run / "tokenizer/tokenizer.json", "a") as file:
        file.write(" ")
    with pytest.raises(UserError, match="is not the tokenizer that"):
        load_run(run)
    (run / "config.yaml").write_text("stage: pretrain\n")
    with pytest.raises(UserError, match="lacks stage, model_name or model"):
        load_run(run)


def test_fields_that_leave_the_shapes_alone_may_change(stages, tmp_path):
    sft.main(
        [
            *SMALL[:5],
            f"--output_path={tmp_path}",
            f"--init_from=output/pretrain_{NAME}",
            "--model.norm_eps=1e-5",
            "--max_seq_len=40",
        ]
    )
    config = load_run(tmp_path / f"sft_{NAME}").config
    assert config["model"]["norm_eps"] == 1e-5 and config["max_seq_len"] == 40 and config["model"]["max_seq_len"] == 48


def test_few_documents_leave_none_to_hold_out(stages, tmp_path, capsys):
    for name in ("pretrain_train.bin", "pretrain_train.meta.json", "pretrain_train.docs.npy"):
        shutil.copy(stages / "output/data" / name, tmp_path)
    (tmp_path / "pretrain_val.bin").touch()
    summary = pretrain.main(
        [
            f"--model_name={NAME}",
            *SMALL,
            f"--output_path={tmp_path}",
            f"--pretrain_data_path={tmp_path}/pretrain_train.bin",
        ]
    )
    assert summary["val_loss"] is None and "no held-out data next to" in capsys.readouterr().err


def test_fine_tuning_warns_when_the_pretraining_is_not_finished(stages, tmp_path, capsys):
    shutil.copytree(stages / f"output/pretrain_{NAME}", tmp_path / "unfinished")
    shutil.rmtree(tmp_path / "unfinished/final")
    sft.main([f"--init_from={tmp_path / 'unfinished'}", *SMALL[:5], f"--output_path={tmp_path}"])
    assert "has not finished its training" in capsys.readouterr().err


def case(script, message, *flags):
    return pytest.param(script, flags, message, id=message[:40])


@pytest.mark.parametrize(
    "script, flags, message",
    [
        case(pretrain, "which model? add --model_name="),
        case(pretrain, "unknown model", f"--model_name={NAME[:-1]}x"),
        case(pretrain, "no data file none.bin: make it with", f"--model_name={NAME}", "--pretrain_data_path=none.bin"),
        case(
            pretrain,
            "no tokenizer in nowhere: run python train_tokenizer.py",
            f"--model_name={NAME}",
            "--tokenizer_path=nowhere",
        ),
        case(pretrain, "with another tokenizer", f"--model_name={NAME}", "--tokenizer_path=other_tokenizer"),
        case(pretrain, "beyond the vocabulary", f"--model_name={NAME}", "--pretrain_data_path=foreign.bin"),
        case(pretrain, "PyTorch sees no CUDA device", f"--model_name={NAME}", "--device=cuda"),
        case(pretrain, "did you mean --model.n_layers?", f"--model_name={NAME}", "--model.n_layer=3"),
        case(pretrain, "must be at least 0 and below 1", "--betas=0.9,1.5"),
        case(pretrain, "--max_batch_size=0 takes as many sequences as fit the device", "--max_batch_size=0"),
        case(pretrain, "--accumulation_steps=0: must be at least 1", "--accumulation_steps=0"),
        case(pretrain, "--max_lr=-1.0: must be at least 0", "--max_lr=-1"),
        case(pretrain, "--min_lr=1.0 is above --max_lr", "--min_lr=1"),
        case(pretrain, "must be at least 0 and below 9", "--seed=12345678901234567890"),
        case(pretrain, "the name of a folder in --output_path, not a path", "--run_name=../../x"),
        case(pretrain, "not a path", "--run_name=.."),
        case(pretrain, "n_layers=-1 must be at least 1", f"--model_name={NAME}", "--model.n_layers=-1"),
        case(
            pretrain,
            "made for sft, not for pretrain",
            f"--model_name={NAME}",
            "--pretrain_data_path=output/data/sft_train.bin",
        ),
        case(sft, "made for pretrain, not for sft", "--sft_data_path=output/data/pretrain_train.bin"),
        case(sft, "that run is of the stage pretrain, not sft", f"--resume=output/pretrain_{NAME}"),
        case(sft, "takes at most 48 tokens", "--max_seq_len=4096"),
        case(sft, "has no valid checkpoint", "--init_from=empty_run"),
        case(sft, "is no run folder", "--init_from=output"),
        case(sft, "no pretraining run in empty", "--output_path=empty"),
        case(sft, "the architecture's fields must stay as they were", "--model.dim=64"),
        case(sft, "holds", "--model_name=mini_other", f"--init_from=output/pretrain_{NAME}"),
    ],
)
def test_user_errors_are_one_line(stages, script, flags, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if not (stages / "empty_run").exists():
        (stages / "empty_run").mkdir()
        shutil.copy(stages / f"output/pretrain_{NAME}/config.yaml", stages / "empty_run")
        shutil.copytree("output/tokenizer", "other_tokenizer")
        with open("other_tokenizer/tokenizer.json", "a") as file:
            file.write(" ")
        (stages / "foreign.bin").write_bytes(bytes([1, 0, 255, 255] * 400))  # id 65535, no meta file
    with pytest.raises(ValueError) as caught:
        script.main([*(SMALL if script is pretrain else SMALL[:5]), *flags])
    assert (
        isinstance(caught.value, (UserError, ModelError))
        and message in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_published_bin_file_without_a_meta_file_trains_as_if_it_had_one(stages, capsys):
    """The same tokens, the same losses: bounds of documents are found by <s>, and a warning reports how it is read."""
    (stages / "published").mkdir()
    shutil.copy(stages / "output/data/pretrain_train.bin", stages / "published/mobvoi.bin")
    losses = []
    for path in ("output/data/pretrain_train.bin", "published/mobvoi.bin"):
        summary = pretrain.main([f"--model_name={NAME}", *SMALL, f"--pretrain_data_path={path}", "--log_interval=1"])
        lines = (stages / summary["run"] / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
        warned = "mobvoi.meta.json is missing: reading published/mobvoi.bin as uint16" in capsys.readouterr().err
        assert warned == (path == "published/mobvoi.bin")
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_bin_file_of_an_odd_size_is_one_line(stages):
    (stages / "odd.bin").write_bytes(bytes([1, 0] * 400 + [5]))
    with pytest.raises(UserError, match="odd.bin is cut off in the middle of a token") as caught:
        pretrain.main([f"--model_name={NAME}", *SMALL, "--pretrain_data_path=odd.bin"])
    assert "\n" not in str(caught.value)


def test_the_command_prints_one_line_and_fails(stages):
    command = [
        sys.executable,
        str(ROOT / "pretrain.py"),
        "--model_name=nothing",
        f"--tokenizer_path={stages / 'output/tokenizer'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: unknown model 'nothing'")
