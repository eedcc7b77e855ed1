"""The demo's preset of a model that has none of its own: small, and never more than the model takes."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
import yaml

from demo import preset
from model import BaseModel, BaseModelArgs, ModelError, get_model_and_args
from tests.support.models import BASE_MODEL, SHIPPED
from utils.config import typed_model_values


@dataclass
class OddModelArgs(BaseModelArgs):
    dim: int = 512
    n_heads: int = 3  # does not divide the small width
    rope_theta: float = 1e4
    layer_types: tuple = ("a", "b")


class OddModel(BaseModel):
    model_name = "odd"

    def __init__(self, args):
        super().__init__(args)
        if args.n_heads != 3:
            raise ModelError("three heads or nothing")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_architecture_takes_the_small_sizes(name):
    Model, Args = get_model_and_args(name)
    sizes = preset.small_sizes(Model, Args)
    assert sizes["dim"] <= 256 and set(sizes) <= {field.name for field in dataclasses.fields(Args)}
    assert typed_model_values(sizes, Args) == sizes  # as --config reads them
    with torch.device("meta"):
        model = Model(Args(**sizes))
    assert sum(parameter.numel() for parameter in model.parameters()) < 30e6  # with a vocabulary of 32,000


def test_a_model_that_does_not_take_them_keeps_its_own(capsys):
    assert preset.small_sizes(OddModel, OddModelArgs) == {}
    assert "three heads or nothing" in capsys.readouterr().err


def test_a_model_without_a_preset_gets_one_from_the_shared_fields(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/any_cpu.yaml").write_text("max_lr: 0.01\n", encoding="utf-8")
    monkeypatch.setattr(preset, "ROOT", tmp_path)
    name = BASE_MODEL
    written = yaml.safe_load(preset.preset(name, tmp_path / "output").read_text(encoding="utf-8"))
    assert written["max_lr"] == 0.01 and written["model"]["dim"] == preset.SMALL["dim"]
    own = tmp_path / f"configs/{name}_cpu.yaml"
    own.write_text("max_lr: 0.02\n", encoding="utf-8")
    assert preset.preset(name, tmp_path / "output") == own
