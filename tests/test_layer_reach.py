"""scripts/layer_reach.py: the picture shows what the layers read."""

import torch
from torch import nn

from model import get_model_and_args
from scripts.layer_reach import draw, kind_of, layer_reach
from tests.support.models import CHAT_MODEL, TINY, sizes_of


class Shift(nn.Module):
    """Each token gets the input of the token two places before it."""

    def forward(self, x):
        return (x + nn.functional.pad(x, (0, 0, 2, 0))[:, : x.shape[1]],)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.layers = nn.ModuleList([Shift(), nn.Linear(4, 4)])

    def forward(self, ids):
        return self.layers[1](self.layers[0](self.table(ids))[0])


def test_a_layer_reads_what_its_gradient_reaches():
    shift, dense = layer_reach(TwoLayers(), torch.arange(6))
    assert torch.equal(shift > 0, torch.eye(6).roll(2, 0).tril().bool())
    assert torch.equal(dense > 0, torch.eye(6).bool())


def test_the_picture_has_a_panel_per_layer(tmp_path):
    Model, ModelArgs = get_model_and_args(CHAT_MODEL)
    model = Model(ModelArgs(vocab_size=50, max_seq_len=12, **sizes_of(CHAT_MODEL, TINY)))
    reach = layer_reach(model, torch.arange(12))
    assert all(torch.equal(values > 0, torch.ones(12, 12).tril().bool()) for values in reach)
    assert kind_of(model.layers[0]) == "Attention"
    draw(model, reach, tmp_path / "reach.png")
    assert (tmp_path / "reach.png").stat().st_size > 1000
