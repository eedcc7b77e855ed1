"""LFM3: equal to transformers' class, and its parts to the equations, token by token."""

import random

import pytest
import torch

from checks import ModelUnderTest
from model import ModelError, State
from model.lfm3 import CONV, FULL, KINDS, SLIDING, Lfm3Model, Lfm3ModelArgs, ShortConv
from tests.support.same_as_transformers import (
    assert_published_names,
    assert_same_files,
    assert_same_numbers,
    assert_same_text,
    random_model,
    write,
)

PUBLISHED = {  # the keys of LFM3-1.7B
    "architectures": ["Lfm3ForCausalLM"],
    "model_type": "lfm3",
    "vocab_size": 128000,
    "hidden_size": 2048,
    "intermediate_size": 7680,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-5,
    "conv_L_cache": 7,
    "conv_bias": False,
    "attention_bias": False,
    "sliding_window": 256,
    "use_attention_gate": True,
    "use_sandwich_norm": True,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5},
    },
    "layer_types": [CONV, CONV, FULL, CONV, *5 * [SLIDING, CONV, FULL, CONV]],
}


def tiny(**changes):
    return ModelUnderTest(Lfm3Model.model_name).changed_args(**changes)


def random_args(seed, **changes):
    """Sizes that share no factor by design; every switch takes each of its values, every kind of layer is there."""
    r = random.Random(seed)
    heads, types = r.choice([2, 3, 4, 6]), [*KINDS, r.choice(KINDS)]
    r.shuffle(types)
    fields = {
        "vocab_size": r.randrange(53, 131),
        "max_seq_len": 40,
        "n_layers": 4 + (seed % 4 == 0),
        "layer_types": () if seed % 4 == 0 else types,  # the published pattern has all three in five layers
        "conv_size": r.choice([1, 2, 3, 5, 7]),
        "window_size": r.choice([2, 3, 5, 8, 13, 40]),
        "n_heads": heads,
        "n_kv_heads": r.choice([g for g in (1, 2, 3, 4, 6) if heads % g == 0]),
        "head_dim": r.choice([4, 6, 10, 14]),
        "dim": r.randrange(19, 45),
        "inter_dim": r.randrange(31, 67),
        "head_gate": seed % 5 > 0,
        "sandwich_norm": seed % 3 > 0,
        "norm_eps": (1e-5, 1e-6)[seed % 2],
        "rope_theta": r.choice([10000.0, 1e6, 1234.5]),
        "rope_proportion": (0.5, 0.25, 1.0, 0.7)[seed % 4],
        "rope_local_theta": r.choice([10000.0, 321.0]),
        "tie_embeddings": seed % 2 == 0,
    }
    return Lfm3ModelArgs(**fields | changes)


def some(seeds, quick):
    """The seeds as parameters, all but the first few of them slow."""
    return [pytest.param(seed, marks=() if seed < quick else pytest.mark.slow) for seed in range(seeds)]


@pytest.mark.parametrize("seed", some(12, quick=3))
def test_logits_loss_and_gradients(seed, tmp_path):
    model = random_model(random_args(seed), seed)
    write(model, tmp_path)
    assert_same_numbers(model, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_256_greedy_tokens(seed, tmp_path):
    model = random_model(random_args(seed, max_seq_len=300), seed)
    write(model, tmp_path)
    assert_same_text(model, tmp_path)


@pytest.mark.parametrize("seed", some(4, quick=1))
def test_import_and_export(seed, tmp_path):
    model = random_model(random_args(seed), seed)
    write(model, tmp_path)
    assert_same_files(model, tmp_path)


def test_published_names_and_shapes():
    assert_published_names(Lfm3Model, PUBLISHED)


def test_the_sizes_cover_every_switch():
    seen = [random_args(seed) for seed in range(12)]
    for switch in ("head_gate", "sandwich_norm", "tie_embeddings"):
        assert {getattr(args, switch) for args in seen} == {True, False}
    assert all(set(args.kinds()) == set(KINDS) for args in seen)
    assert {1, 2} <= {args.conv_size for args in seen} and {2, 40} <= {args.window_size for args in seen}


def test_layer_types():
    assert list(Lfm3ModelArgs(n_layers=24).kinds()) == PUBLISHED["layer_types"]
    kinds = Lfm3ModelArgs().kinds()
    assert [kinds.count(kind) for kind in KINDS] == [7, 2, 3]
    for types in ([CONV], [CONV, "mamba"]):
        with pytest.raises(ModelError, match="layer_types has") as error:
            tiny(n_layers=2, layer_types=types)
        assert "\n" not in str(error.value)


def test_short_convolution_equals_its_equation_token_by_token():
    """In float64, over document borders, padding and a state that is filled in chunks."""
    torch.manual_seed(0)
    size, dim = 4, 6
    part = ShortConv(tiny(dim=dim, conv_size=size), layer=0).double()
    for param in part.parameters():
        torch.nn.init.normal_(param)
    x = torch.randn(2, 11, dim, dtype=torch.double)
    docs = torch.tensor([[0, 0, 1, 2, 2, 2, 2, 2, 3, -1, -1], [0] * 11])

    def equation(doc_ids):
        b, c, h = (x @ part.in_proj.weight.T).split(dim, dim=-1)
        out = torch.zeros_like(x)
        for row in range(2):
            for t in range(11):
                for j in range(min(size, t + 1)):
                    if doc_ids[row, t] == doc_ids[row, t - j]:
                        out[row, t] += part.conv.weight[:, size - 1 - j] * b[row, t - j] * h[row, t - j]
        return (c * out) @ part.o_proj.weight.T

    got = part(x, None, None, None, docs)[0]
    torch.testing.assert_close(got, equation(docs), rtol=1e-12, atol=1e-12)
    want, state, start = equation(docs * 0), State(torch.zeros(2, dtype=torch.long), 11, [{}]), 0
    for n in (3, 1, 1, 5, 1):
        got = part(x[:, start : start + n], None, None, state, None)[0]
        torch.testing.assert_close(got, want[:, start : start + n], rtol=1e-12, atol=1e-12)
        state.advance(n)
        start += n


@torch.no_grad()
@pytest.mark.parametrize("kind,reach", [(CONV, 4), (SLIDING, 7), (FULL, 24)])
def test_a_token_reaches_as_far_as_the_window(kind, reach):
    model = ModelUnderTest(Lfm3Model.model_name).build(n_layers=1, layer_types=(kind,), conv_size=4, window_size=7)
    ids = torch.arange(24)[None]
    changed = ids.clone()
    changed[0, 9] = 50
    differs = (model(ids)[0] - model(changed)[0]).abs().amax(dim=-1)[0] > 1e-6
    assert differs.nonzero().flatten().tolist() == list(range(9, min(9 + reach, 24)))


def test_what_is_logged():
    model, ids = ModelUnderTest(Lfm3Model.model_name).build(), torch.arange(12)[None]
    out = model(ids, targets=ids)[2]
    assert out["conv/taps"].shape == (3, 4) and out["gate/open"].shape == (2, 4)
    torch.testing.assert_close(out["conv/taps"].sum(dim=-1), torch.ones(3))
    assert ((out["gate/open"] > 0) & (out["gate/open"] < 1)).all()
    padded, docs = torch.cat((ids, ids), dim=1), torch.tensor([[0] * 12 + [-1] * 12])
    torch.testing.assert_close(model(padded, targets=padded, doc_ids=docs)[2]["gate/open"], out["gate/open"])
