"""Checkpoints: complete or absent, tied weights, damage, nothing executed."""

import json
import os
import pickle

import pytest
import torch

from engine.runs.checkpoint import (
    load_weights,
    manifest_bytes,
    newest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
    weights_bytes,
)
from tests.support.tiny_model import TinyModel, TinyModelArgs
from utils.errors import UserError


def tiny(**fields):
    return TinyModel(TinyModelArgs(vocab_size=32, max_seq_len=8, **fields))


def save_weights(model, path):
    path.write_bytes(weights_bytes(model))


def saved(run, step, model=None):
    folder = run / "checkpoints" / f"step-{step:08d}"
    model = model or tiny()
    save_checkpoint(folder, model, torch.optim.AdamW(model.parameters()), {"step": step}, {"step": step})
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_weights_round_trip(tmp_path, tied):
    first, second = tiny(tied=tied), tiny(tied=tied)
    first.bias += 3
    save_weights(first, tmp_path / "w")
    load_weights(second, tmp_path / "w")
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert (second.lm_head.weight is second.tok_embed.weight) == tied
    if tied:
        size = os.path.getsize(tmp_path / "w")
        save_weights(tiny(), tmp_path / "untied")
        assert size < os.path.getsize(tmp_path / "untied")


def test_weights_of_another_shape_are_named(tmp_path):
    save_weights(tiny(), tmp_path / "w")
    with pytest.raises(UserError, match="tok_embed.weight is .*fields must stay"):
        load_weights(tiny(dim=8), tmp_path / "w")
    other = tiny()
    other.register_buffer("new", torch.zeros(1))
    with pytest.raises(UserError, match="lacks new"):
        load_weights(other, tmp_path / "w")
    save_weights(other, tmp_path / "w")
    with pytest.raises(UserError, match="holds new"):
        load_weights(tiny(), tmp_path / "w")


def test_damage_is_found_and_skipped(tmp_path, capsys):
    folders = [saved(tmp_path, step) for step in (1, 2, 3, 4)]
    assert newest_checkpoint(tmp_path) == folders[3] and verify_checkpoint(folders[3]) is None
    (folders[3] / "manifest.json").unlink()
    with open(folders[2] / "model.safetensors", "r+b") as file:  # one flipped bit
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 4]))
    os.truncate(folders[1] / "optimizer.pt", 10)
    assert newest_checkpoint(tmp_path) == folders[0]
    errors = capsys.readouterr().err
    for step in (2, 3, 4):
        assert f"step-0000000{step}" in errors


def test_no_pickle_is_executed(tmp_path):
    folder, marker = saved(tmp_path, 1), tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    for name in ("optimizer.pt", "trainer_state.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(pickle.UnpicklingError):
            torch.load(folder / name, weights_only=True)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(tiny(), folder / "model.safetensors")
    assert not marker.exists()


def test_manifest_names_stay_inside_the_folder(tmp_path):
    folder = saved(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].append({"name": "../../../etc/passwd"})
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))
    assert verify_checkpoint(folder) == "passwd is missing"
