"""Payloads in every file of a run and of its data: reading them executes nothing, and a refusal is one line."""

import json
import pickle
import shutil

import numpy as np
import pytest

import pretrain
import sft
from engine.data.token_file import TokenFile
from engine.runs.checkpoint import (
    MANIFEST,
    file_sha256,
    find_checkpoints,
    load_training_state,
    manifest_bytes,
)
from engine.runs.metrics import read_metrics
from engine.runs.registry import find_runs, load_run
from engine.training.config import TrainConfig
from engine.training.optim import build_optimizer
from model import ModelError, get_model_and_args
from tests.support.models import BASE_MODEL
from tests.support.pickles import Payload, raw_pickle, torch_file
from tests.support.token_files import stage_files
from utils.errors import UserError
from utils.tokenizer import load_tokenizer

NAME = BASE_MODEL
FLAGS = ["--device=cpu", "--max_batch_size=2", "--sample_interval=0", "--eval_interval=0", "--save_interval=1"]
MODEL = [f"--model_name={NAME}", "--model.dim=32", "--model.n_layers=2", "--max_seq_len=48", "--skip_checks"]


def yaml_tag(path):
    path.write_text("stage: !!python/object/apply:os.mkdir [executed]\n")


def yaml_in_a_mapping(path):
    path.write_text(path.read_text() + "\nmore: !!python/object/new:os.mkdir [executed]\n")


def template(path):
    path.write_text("{{ cycler.__init__.__globals__.os.mkdir('executed') }}")


def nested(path):
    path.write_text("[" * 100_000 + "]" * 100_000)


def not_a_mapping(path):
    path.write_text("[\"__import__('os').mkdir('executed')\"]")


def object_array(path):
    np.save(path, np.array([Payload()], dtype=object), allow_pickle=True)


def source(path):
    path.write_text("import os\nos.mkdir('executed')\n")


RUN_FILES = [
    ("optimizer.pt", raw_pickle),
    ("optimizer.pt", torch_file),
    ("trainer_state.pt", raw_pickle),
    ("trainer_state.pt", torch_file),
    ("model.safetensors", raw_pickle),
    ("model.safetensors", torch_file),
    (MANIFEST, raw_pickle),
    (MANIFEST, nested),
    (MANIFEST, not_a_mapping),
    ("run.json", raw_pickle),
    ("run.json", nested),
    ("run.json", not_a_mapping),
    ("config.yaml", raw_pickle),
    ("config.yaml", yaml_tag),
    ("config.yaml", yaml_in_a_mapping),
    ("metrics.jsonl", raw_pickle),
    ("metrics.jsonl", nested),
    ("metrics.jsonl", not_a_mapping),
    ("summary.json", raw_pickle),
    ("summary.json", nested),
    ("summary.json", not_a_mapping),
    ("samples.md", raw_pickle),
    ("tokenizer/tokenizer.json", raw_pickle),
    ("tokenizer/tokenizer.json", nested),
    ("tokenizer/tokenizer_config.json", raw_pickle),
    ("tokenizer/chat_template.jinja", template),
    (f"{BASE_MODEL.removeprefix('mini_')}.py", source),
]
DATA_FILES = [
    ("docs.npy", object_array),
    ("docs.npy", raw_pickle),
    ("meta.json", raw_pickle),
    ("meta.json", nested),
    ("meta.json", not_a_mapping),
    ("bin", raw_pickle),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tokenizer, data and a finished run of two steps."""
    path = tmp_path_factory.mktemp("hostile")
    stage_files(path / "output")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        pretrain.main([*MODEL, *FLAGS, "--max_steps=2", *places(path)])
    run = path / f"output/pretrain_{NAME}"
    (path / "fields.json").write_text(json.dumps(json.loads((run / "run.json").read_text())["identity"]["model"]))
    (run / "samples.md").touch()
    return path


def places(path):
    out = path / "output"
    return [
        f"--output_path={out}",
        f"--tokenizer_path={out}/tokenizer",
        f"--pretrain_data_path={out}/data/pretrain_train.bin",
    ]


def plant(run, name, how):
    """Put the payload into each file of that name, and update the manifests, as an attacker would."""
    for path in [p for p in run.rglob(name) if "logs" not in p.parts] or [run / name]:
        how(path)
    for folder in [*find_checkpoints(run), run / "final"]:
        if name != MANIFEST:
            manifest = json.loads((folder / MANIFEST).read_text())
            for entry in manifest["files"]:
                path = folder / entry["name"]
                entry.update(size=path.stat().st_size, sha256=file_sha256(path))
            (folder / MANIFEST).write_bytes(manifest_bytes(manifest))


def attempt(reader, *arguments):
    """Read; return the message of a refusal, which must be one line, else None."""
    try:
        reader(*arguments)
    except ValueError as error:
        assert isinstance(error, (UserError, ModelError)), repr(error)
        assert "\n" not in str(error)
        return str(error)


def read(path, run):
    """Call every reader; return the messages of those that refused."""
    tokenizer = load_tokenizer(path / "output/tokenizer")

    def restore():
        Model, ModelArgs = get_model_and_args(NAME)
        model = Model(ModelArgs(**json.loads((path / "fields.json").read_text())))
        load_training_state(find_checkpoints(run)[0], model, build_optimizer(model, TrainConfig()))

    def data(name):
        TokenFile(path / f"output/data/{name}.bin", tokenizer, "make").documents()

    calls = [
        (find_runs, path / "output"),
        (read_metrics, run / "metrics.jsonl"),
        (load_run, run),
        (restore,),
        (data, "pretrain_train"),
        (data, "sft_val"),
    ]
    return [message for message in (attempt(*call) for call in calls) if message]


def train(path, run):
    """Run the commands that read a run (the same, --resume=PATH, fine-tuning); return the messages of refusals."""
    calls = [
        (pretrain.main, [*MODEL, *FLAGS, "--max_steps=2", *places(path)]),
        (pretrain.main, [*MODEL, *FLAGS, "--max_steps=3", *places(path), f"--resume={run}"]),
        (
            sft.main,
            [
                *FLAGS,
                "--max_steps=3",
                *places(path)[:2],
                f"--init_from={run}",
                f"--sft_data_path={path}/output/data/sft_train.bin",
            ],
        ),
    ]
    return [message for message in (attempt(*call) for call in calls) if message]


@pytest.mark.parametrize("reader", [read, pytest.param(train, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name, how", RUN_FILES, ids=lambda value: getattr(value, "__name__", value))
def test_a_hostile_run_executes_nothing(folder, tmp_path, monkeypatch, name, how, reader):
    path = shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(path)
    run = path / "output" / f"pretrain_{NAME}"
    plant(run, name, how)
    reader(path, run)
    assert not list(path.rglob("executed"))


@pytest.mark.parametrize("reader, refusals", [(read, 2), pytest.param(train, 3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name, how", DATA_FILES, ids=lambda value: getattr(value, "__name__", value))
def test_hostile_data_executes_nothing_and_is_refused(folder, tmp_path, monkeypatch, name, how, reader, refusals):
    path = shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(path)
    for stage in ("pretrain", "sft"):
        for part in ("train", "val"):
            how(path / f"output/data/{stage}_{part}.{name}")
    assert len(reader(path, path / "output" / f"pretrain_{NAME}")) == refusals
    assert not list(path.rglob("executed"))


def test_the_payload_works(tmp_path, monkeypatch):
    """A loader that executes pickles creates the folder, so the tests above can fail."""
    monkeypatch.chdir(tmp_path)
    raw_pickle(tmp_path / "file")
    pickle.loads((tmp_path / "file").read_bytes())
    assert (tmp_path / "executed").is_dir()
