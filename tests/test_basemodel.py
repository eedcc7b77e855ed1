"""What the contract gives every model: start values of modules' own, counts of several tables, groups."""

import pytest
import torch
from torch import nn

from model import BaseModel, BaseModelArgs
from model.layers import CausalConv, Rotary, rope_frequencies, rotate

V, D, N = 50, 8, 31


class Decay(nn.Module):
    scalar_params = ("rate",)

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.empty(3, 4))
        self.up_proj = nn.Linear(D, D, bias=False)

    def init_weights(self):
        nn.init.constant_(self.rate, 7.0)


class Tables(BaseModel):
    """An embedding of tokens, one of n-grams, and a head, tied or not."""

    def __init__(self, tied):
        super().__init__(BaseModelArgs(V, 16))
        self.tok_embed = nn.Embedding(V, D)
        self.ngram_embed = nn.Embedding(N, D)
        self.layers = nn.ModuleList([nn.Sequential(Decay(), CausalConv(D, 4, bias=True))])
        self.lm_head = nn.Linear(D, V, bias=False)
        if tied:
            self.lm_head.weight = self.tok_embed.weight
        self.init_weights()

    def attention_flops_per_token(self, seq_len):
        return 0


def test_modules_set_their_own_start_values_after_the_general_rule():
    model = Tables(tied=True)
    decay, conv = model.layers[0]
    assert (decay.rate == 7).all() and decay.up_proj.weight.std() < 0.05
    assert 0.2 < conv.weight.std() < 0.4 and conv.weight.abs().max() <= 0.5 and not conv.bias.any()


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_that_is_no_head_is_no_matmul(tied):
    model = Tables(tied)
    rest = 12 + D * D + 4 * D + D
    counts = model.num_params()
    assert counts == {"total": V * D * (2 - tied) + N * D + rest, "active": counts["total"], "embedding": (V + N) * D}
    assert model.flops_per_token(16) == 6 * (V * D + rest)


@pytest.mark.parametrize("tied", [False, True])
def test_groups_follow_what_modules_name(tied):
    model = Tables(tied)
    decay, conv = model.layers[0]
    groups = {name: {id(p) for p in params} for name, params in model.param_groups().items()}
    assert groups["matrix"] == {id(decay.up_proj.weight)}
    assert groups["scalar"] == {id(decay.rate), id(conv.weight), id(conv.bias)}
    assert groups["embed"] == {id(p) for p in (model.tok_embed.weight, model.ngram_embed.weight, model.lm_head.weight)}


def test_partial_rotary_turns_the_first_channels():
    x, positions = torch.randn(2, 5, 3, 12), torch.arange(5)[None]
    cos, sin = Rotary(8, 16, 100.0)(positions)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned[..., :8], rotate(x[..., :8], cos, sin))
    assert torch.equal(turned[..., 8:], x[..., 8:])


def test_proportional_rotary_turns_the_first_pairs_at_the_speed_of_the_full_head():
    x, positions = torch.randn(2, 5, 3, 16), torch.arange(5)[None]
    full, part = Rotary(16, 16, 100.0)(positions), Rotary(16, 16, 100.0, proportion=0.25)(positions)
    turned, all_turned = rotate(x, *part), rotate(x, *full)
    for channels in (slice(0, 2), slice(8, 10)):  # the pairs 0 and 1
        assert torch.equal(turned[..., channels], all_turned[..., channels])
    for channels in (slice(2, 8), slice(10, 16)):
        assert torch.equal(turned[..., channels], x[..., channels])
    assert rope_frequencies(16, 100.0)[3] > 0
