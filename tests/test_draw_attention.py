"""scripts/draw_attention.py: the probabilities that it draws are those of the model."""

import pytest
import torch

from checks import ModelUnderTest
from scripts.draw_attention import draw, probabilities
from tests.support.models import CHAT_MODEL, SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_probabilities_of_every_architecture(name):
    tested = ModelUnderTest(name)
    model, ids = tested.build(), tested.tokens(batch_size=1)
    with torch.inference_mode():
        before = model(ids)[0]
        layers = probabilities(model, ids)
        assert torch.equal(model(ids)[0], before)  # and the model is as it was
    for layer in layers:
        assert layer.ndim == 3 and layer.min() >= 0 and layer.sum(dim=-1).max() < 1 + 1e-5


def test_a_picture_of_every_layer(tmp_path):
    tested = ModelUnderTest(CHAT_MODEL)
    layers = probabilities(tested.build(), tested.tokens(batch_size=1))
    assert len(layers) == tested.args.n_layers
    for layer in layers:
        assert torch.equal(layer > 0, torch.ones_like(layer).tril().bool())
        torch.testing.assert_close(layer.sum(dim=-1), torch.ones(layer.shape[:2]))
    draw(layers, tmp_path / "attention.png", columns=2)
    assert (tmp_path / "attention.png").stat().st_size > 1000
