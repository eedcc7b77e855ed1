"""Our models are the published ones: logits, loss, gradients and greedy text, against transformers."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from model import ModelError, get_model_and_args
from model.deepseekv3 import LatentAttention, TokenInfo

transformers = pytest.importorskip("transformers")
from tests.support.same_as_transformers import (  # noqa: E402  (it needs transformers)
    PROMPT,
    assert_same_gradients,
    assert_same_text,
    our_gradients,
    random_batch,
    random_model,
    write,
)
from tests.support.transformers_models import (  # noqa: E402
    DEEPSEEK,
    LLAMA,
    SEEDS,
    load,
    random_args,
    reference_gradients,
    reference_loss,
)

transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [LLAMA, DEEPSEEK])
def test_logits_loss_and_gradients(name, seed, tmp_path):
    args = random_args(name, seed)
    model = random_model(args, seed)
    write(model, tmp_path)
    reference, mtp = load(tmp_path)

    ids, labels, targets = random_batch(args.vocab_size, seed, length=31)
    with torch.no_grad():
        logits, want = model(ids)[0], reference(ids).logits
    assert (logits - want).abs().max() < 1e-5
    assert want.std() > 0.3  # weights at which an error would show

    loss = model(ids, targets=targets)[1]
    want = reference_loss(reference, mtp, ids, labels, getattr(args, "mtp_loss_weight", 0.0))
    assert abs(loss.item() - want.item()) < 1e-6 * max(1.0, want.item())

    loss.backward()
    want.backward()
    repeated = r"layers\.\d+\.(embed_tokens|shared_head\.head)\."  # what an MTP module shares with the model
    experts = r"mlp\.(gate|experts)\."  # no token chose the expert, or it is the only one and its weight is always 1
    assert_same_gradients(our_gradients(model), reference_gradients(reference, mtp), 1e-4, repeated, experts)


def test_the_configurations_cover_every_switch():
    seen = [vars(random_args(DEEPSEEK, seed)) for seed in SEEDS]
    both = seen + [vars(random_args(LLAMA, seed)) for seed in SEEDS]
    for side in (seen, both[len(seen) :]):
        assert {a["tie_embeddings"] for a in side} == {True, False}
        assert {a["rope_type"] for a in side} == {"default", "llama3", "yarn"}
    assert {a["n_mtp_layers"] for a in seen} == {0, 1, 2}
    assert {a["n_shared_experts"] for a in seen} == {0, 1, 2}
    assert {a["norm_topk"] for a in seen} == {True, False}
    assert any(a["q_lora_rank"] == 0 for a in seen) and any(a["q_lora_rank"] for a in seen)
    assert {(a["n_expert_groups"] > 1, a["n_limited_groups"] < a["n_expert_groups"]) for a in seen} == {
        (False, False),
        (True, False),
        (True, True),
    }
    assert any(a["route_scale"] != 1 for a in seen)
    assert {min(a["n_dense_layers"], 1) + (a["n_dense_layers"] == a["n_layers"]) for a in seen} == {0, 1, 2}
    assert any(a["rope_mscale_all_dim"] for a in seen)


@pytest.mark.parametrize("seed", [0, 2, 7])
@pytest.mark.parametrize("name", [LLAMA, DEEPSEEK])
def test_256_greedy_tokens(name, seed, tmp_path, monkeypatch):
    args = random_args(name, seed, max_seq_len=300)
    model = random_model(args, seed)
    write(model, tmp_path)
    absorbed = []
    inner = LatentAttention._absorbed
    monkeypatch.setattr(LatentAttention, "_absorbed", lambda *inputs: absorbed.append(1) or inner(*inputs))
    assert_same_text(model, tmp_path)
    assert len(absorbed) == (255 * args.n_layers if name == DEEPSEEK else 0)


@pytest.mark.parametrize("modules", [1, 2])
def test_256_greedy_tokens_with_mtp_drafts(modules, tmp_path):
    args = random_args(DEEPSEEK, 4, max_seq_len=300, n_dense_layers=1, n_mtp_layers=modules)
    model = random_model(args, seed=2)
    write(model, tmp_path)
    assert_same_text(model, tmp_path, reference=load(tmp_path)[0], use_mtp=True)


def test_mtp_drafts_are_the_ones_we_would_make(tmp_path):
    """A draft that is always rejected would leave the greedy text right: so the drafts themselves are compared."""
    args = random_args(DEEPSEEK, 4, n_dense_layers=1, n_mtp_layers=2)
    model = random_model(args)
    write(model, tmp_path)
    reference, mtp = load(tmp_path)
    ids = torch.tensor([[*PROMPT, 3, 4]])
    with torch.no_grad():
        theirs = reference(ids, output_hidden_states=True).hidden_states[-1]
        hidden = []
        handle = model.norm.register_forward_hook(lambda module, inputs, out: hidden.append(out))
        model(ids)
        handle.remove()
        ours, embedded = hidden[0], model.tok_embed(ids)
        for k in (1, 2):
            n = ids.shape[1] - k
            positions = torch.arange(n)[None]
            ours = model.mtp[k - 1](ours[:, :n], embedded[:, k:], TokenInfo(model.rotary(positions)))[0]
            theirs = mtp.forward_layer(k - 1, theirs[:, :n], positions + k, None, input_ids=ids[:, k:])
            assert (ours - theirs).abs().max() < 2e-5


@pytest.mark.slow
def test_mtp_drafts_in_the_published_depth(tmp_path):
    """61 layers are where transformers looks for the module by itself."""
    args = random_args(DEEPSEEK, 4, max_seq_len=80, n_layers=61, n_dense_layers=3, n_mtp_layers=1, dim=24, n_heads=2)
    model = random_model(args)
    with torch.no_grad():  # 61 layers of unit gain would drown the embedding
        for name, param in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                param.mul_(0.2)
    write(model, tmp_path)
    assert_same_text(model, tmp_path, new=64, use_mtp=True)


def test_rope_scaling_reaches_beyond_the_training():
    """The tables themselves, at long positions and at the published sizes, against transformers' frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from model.layers import rope_amplitude, rope_frequencies

    def yarn(mscale):
        fields = dict(rope_type="yarn", rope_factor=40.0, rope_original_max_seq_len=4096)
        return fields | dict(rope_mscale=mscale, rope_mscale_all_dim=mscale)

    published = [
        (LLAMA, 128, 5e5, dict(rope_type="llama3", rope_factor=8.0, rope_original_max_seq_len=8192)),  # Llama 3.1
        (LLAMA, 64, 5e5, dict(rope_type="llama3", rope_factor=32.0, rope_original_max_seq_len=8192)),  # Llama 3.2
        (DEEPSEEK, 64, 1e4, yarn(mscale=1.0)),  # DeepSeek-V3
        (DEEPSEEK, 64, 1e4, yarn(mscale=0.707)),
        (LLAMA, 128, 1e6, dict(rope_type="yarn", rope_factor=4.0, rope_original_max_seq_len=32768)),
    ]
    for name, head_dim, theta, fields in published:
        size = {"head_dim": head_dim} if name == LLAMA else {"qk_rope_head_dim": head_dim}
        args = random_args(name, 0, rope_theta=theta, max_seq_len=131072, **size, **fields)
        model_class = get_model_and_args(name)[0]
        config = transformers.AutoConfig.for_model(**model_class.hf_layout.config(args))
        want, amplitude = ROPE_INIT_FUNCTIONS[fields["rope_type"]](config)
        got = rope_frequencies(head_dim, theta, args)
        assert ((got.float() - want) / want).abs().max() < 1e-5
        assert rope_amplitude(args) == pytest.approx(amplitude, rel=1e-6)


ROPE = [
    {"type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 1},
    {"type": "dynamic", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 1.0},
    {"rope_type": "default", "factor": 1.0},
    {"rope_type": "yarn", "factor": 1.0},
    {"rope_type": "yarn", "factor": 4.0},  # no original length: it is max_position_embeddings
    {"type": "yarn", "factor": 4, "beta_fast": 16, "rope_theta": 5000},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 20},  # the factor is the quotient
    {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 1.0, "low_freq_factor": 1, "high_freq_factor": 4},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    None,
]


@pytest.mark.parametrize("name", [LLAMA, DEEPSEEK])
def test_max_seq_len_changes_nothing_but_the_length(name, tmp_path):
    """Every kind of rotary scaling, by config.json as others write it; the logits are transformers' in each case."""
    model = random_model(random_args(name, 0, max_seq_len=40))
    write(model, tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    ids = torch.randint(model.args.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    seen = set()
    for scaling, outer in [*((scaling, {}) for scaling in ROPE), (ROPE[6], {"original_max_position_embeddings": 10})]:
        config = {**written, "rope_scaling": scaling, **outer}
        path.write_text(json.dumps(config))
        with torch.no_grad():
            want = load(tmp_path)[0](ids).logits
            for max_seq_len in (0, 24, 40, 100):
                imported = type(model).from_hf(config, tensors, max_seq_len)
                assert imported.args.max_seq_len == (min(40, max_seq_len) if max_seq_len else 40)
                assert (imported(ids)[0] - want).abs().max() < 1e-5, (scaling, max_seq_len)
        seen.add(round(want.sum().item(), 3))
        config, again = imported.to_hf()
        assert torch.equal(type(model).from_hf(config, again)(ids)[0], imported(ids)[0])
    assert len(seen) >= 7  # the scalings matter


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"rope_scaling": [1]}, "rope_scaling=\\[1\\]"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_scaling": {"type": ["linear"]}}, "known are"),
        ({"rope_scaling": {"type": "linear"}}, "without a factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2'.*a finite number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 9.5}}, "an integer"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4'"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"hidden_size": "32"}, "hidden_size='32'.*an integer"),
        ({"hidden_size": 32.0}, "hidden_size=32.0"),
        ({"num_hidden_layers": [2]}, "num_hidden_layers=\\[2\\]"),
        ({"num_attention_heads": 0}, "n_heads=0 must be at least 1"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"max_position_embeddings": -1}, "must be at least 1"),
        ({"rms_norm_eps": {}}, "rms_norm_eps={}"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
    ],
)
@pytest.mark.parametrize("name", [LLAMA, DEEPSEEK])
def test_a_wrong_type_in_config_json_is_one_line(name, fields, message):
    layout = get_model_and_args(name)[0].hf_layout
    with pytest.raises(ModelError, match=message) as error:
        layout.model_args({**layout.config(random_args(name, 0)), **fields})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"rope_type": "ntk"}, "choose default, linear, llama3 or yarn"),
        ({"rope_type": "linear", "rope_factor": 0.5}, "at least 1"),
        ({"rope_factor": 2.0}, "needs a scaling method"),
        ({"rope_type": "yarn", "rope_factor": 4.0}, "needs rope_original_max_seq_len"),
        ({"rope_type": "yarn", "rope_factor": 0.5, "rope_original_max_seq_len": 9}, "at least 1"),
        (
            {"rope_type": "llama3", "rope_factor": 2.0, "rope_original_max_seq_len": 9, "rope_low_freq_factor": 5.0},
            "must lie between 0 and rope_high_freq_factor",
        ),
    ],
)
@pytest.mark.parametrize("name", [LLAMA, DEEPSEEK])
def test_invalid_rope_settings_are_one_line(name, fields, message):
    args = random_args(name, 0)
    with pytest.raises(ModelError, match=message) as error:
        dataclasses.replace(args, **fields)
    assert "\n" not in str(error.value)
