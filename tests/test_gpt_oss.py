"""gpt-oss: its equations against loops in float64, its statistics, its state; and equality with transformers' class."""

import json
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model import ModelError
from model.gpt_oss import FULL, WINDOW, Attention, GptOssModel, GptOssModelArgs, MoE, TokenInfo
from model.layers import rope_amplitude, rope_frequencies, window_mask
from tests.support.paths import ROOT
from tests.support.same_as_transformers import (
    assert_same_files,
    assert_same_gradients,
    assert_same_numbers,
    assert_same_text,
    load,
    our_gradients,
    random_model,
    their_gradients,
    transformers_or_skip,
    write,
)

LONG = 31  # tokens: windows end inside, no size divides it


def random_weights(args, seed=0):
    """A model in which every parameter matters: large sinks and biases, too."""
    model = random_model(args, seed)
    for name, param in model.named_parameters():
        if name.endswith(("sinks", "bias")):
            torch.nn.init.normal_(param, std=1.0 if name.endswith("sinks") else 0.3)
    return model


def small_args(**changes):
    return GptOssModelArgs(**{**vars(GptOssModelArgs.tiny()), **changes})


def tokens(args, shape=(2, LONG), seed=0):
    return torch.randint(args.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the equations


@pytest.mark.parametrize("window", [None, 1, 5])
def test_attention_equals_a_loop_over_queries(window, monkeypatch):
    """The sink is a further logit whose probability is dropped, in float64, gradients included."""
    monkeypatch.setattr("model.gpt_oss.rotate", lambda x: x)  # it rounds to fp32
    args = small_args()
    torch.manual_seed(0)
    layer = Attention(args, 0, window).double()
    for param in layer.parameters():
        torch.nn.init.normal_(param, std=0.5)
    x = torch.randn(2, 9, args.dim, dtype=torch.double)
    mask = window_mask(torch.arange(9)[None], window=window)
    out, share = layer(x, TokenInfo((), {window: mask}))
    assert share is None

    heads = []
    for head in range(args.n_heads):
        of_kv = head // (args.n_heads // args.n_kv_heads)
        q, k, v = (
            F.linear(x, proj.weight, proj.bias)[..., 8 * h : 8 * h + 8]
            for proj, h in ((layer.q_proj, head), (layer.k_proj, of_kv), (layer.v_proj, of_kv))
        )
        rows = []
        for t in range(9):
            first = 0 if window is None else max(0, t - window + 1)
            score = (k[:, first : t + 1] @ q[:, t, :, None])[..., 0] / 8**0.5  # (B, S)
            with_sink = torch.cat((score, layer.sinks[head].expand(2, 1)), dim=1).softmax(dim=1)
            rows.append((with_sink[:, :-1, None] * v[:, first : t + 1]).sum(dim=1))
        heads.append(torch.stack(rows, dim=1))
    want = layer.o_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(out, want, atol=1e-10, rtol=0)
    grads = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (out, want)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("active", [1, 2, 6])
def test_moe_equals_a_loop_over_tokens(active):
    args = small_args(n_activated_experts=active, swiglu_limit=0.7, swiglu_alpha=1.3)
    torch.manual_seed(0)
    moe = MoE(args).double()
    for param in moe.parameters():
        torch.nn.init.normal_(param, std=0.4)
    x = torch.randn(2, 7, args.dim, dtype=torch.double)
    out, stats = moe(x, TokenInfo((), {}))
    loads, probability, clipped = [0] * 6, torch.zeros(6, dtype=torch.double), 0
    for got, token in zip(out.flatten(0, 1), x.flatten(0, 1), strict=True):
        score = moe.router @ token + moe.router_bias
        chosen = sorted(range(6), key=lambda e: -score[e].item())[:active]
        weight = torch.stack([score[e] for e in chosen]).exp()
        want = 0
        for e, w in zip(chosen, weight / weight.sum(), strict=True):
            gate = moe.gate_proj[e] @ token + moe.gate_bias[e]
            up = moe.up_proj[e] @ token + moe.up_bias[e]
            clipped += int((gate < -0.7).sum() and (gate > 0.7).sum() and (up.abs() > 0.7).sum())
            gate, up = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
            want = want + w * (moe.down_proj[e] @ ((up + 1) * gate / (1 + (-1.3 * gate).exp())) + moe.down_bias[e])
            loads[e] += 1
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # routing is in fp32
        probability += score.softmax(dim=0) / 14
    assert stats.load.tolist() == loads and clipped
    torch.testing.assert_close(stats.probability.double(), probability, atol=1e-6, rtol=0)


def test_shares_of_the_sinks_are_what_the_keys_leave():
    """Against a softmax with one more column, of the queries 16 apart from the last; padding counts for nothing."""
    args = small_args(max_seq_len=40)
    model = random_weights(args)
    ids = tokens(args, (2, 37))
    docs = torch.zeros_like(ids)
    docs[1, 20:] = -1
    shares = model(ids, targets=ids, doc_ids=docs)[2]
    x = model.tok_embed(ids)
    layer = model.layers[0]
    q, k = (p(layer.attn_norm(x)).unflatten(-1, (-1, 8)) for p in (layer.attn.q_proj, layer.attn.k_proj))
    a, b = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
    cos, sin = model.rotary(torch.arange(37)[None])
    q, k = (torch.cat((y[0] * cos - y[1] * sin, y[1] * cos + y[0] * sin), dim=-1) for y in (a, b))
    score = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(2, dim=2)) / 8**0.5
    t = torch.arange(37)
    seen = (t[:, None] >= t) & (t[:, None] - t < args.window_size) & (docs[:, :, None] == docs[:, None])[:, None]
    score = score.masked_fill(~seen, float("-inf"))
    sink = layer.attn.sinks.view(1, -1, 1, 1).expand(2, -1, 37, 1)
    share = torch.cat((score, sink), dim=-1).softmax(dim=-1)[..., -1]  # (B, H, T)
    want = torch.cat([share[0, :, [4, 20, 36]], share[1, :, [4]]], dim=-1).mean(dim=-1)
    torch.testing.assert_close(shares["sink/share"][0], want)
    torch.testing.assert_close(shares["sink/share_window"], shares["sink/share"][[0, 2]].mean())
    torch.testing.assert_close(shares["sink/share_full"], shares["sink/share"][1].mean())


def test_sinks_start_as_off_by_one_attention():
    """exp(0) = 1 in the denominator: with scores near 0 a query that sees n keys gives its sink 1 / (n + 1)."""
    torch.manual_seed(0)
    model = GptOssModel(small_args(window_size=4, n_layers=2))
    shares = model(tokens(model.args, (4, 16)), targets=tokens(model.args, (4, 16)))[2]
    assert shares["sink/share_window"].item() == pytest.approx(1 / 5, abs=0.02)
    assert shares["sink/share_full"].item() == pytest.approx(1 / 17, abs=0.02)


# ---------------------------------------------------------------- arguments and state


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layer_types": (WINDOW,)}, "layer_types has 1 entries, n_layers=3"),
        ({"layer_types": (WINDOW, FULL, "conv")}, "layer_types has conv"),
        ({"n_activated_experts": 7}, "must lie in 1..6"),
        ({"n_heads": 3}, "must be a multiple"),
        ({"swiglu_limit": 0.0}, "above 0"),
        ({"window_size": 0}, "at least 1"),
    ],
)
def test_invalid_arguments_are_one_line(fields, message):
    with pytest.raises(ModelError, match=message) as error:
        small_args(**fields)
    assert "\n" not in str(error.value)


def test_default_size():
    with torch.device("meta"):
        counts = GptOssModel(GptOssModelArgs()).num_params()
    assert 210e6 < counts["total"] < 220e6 and 84e6 < counts["active"] < 90e6


def test_a_window_bounds_the_cache_and_nothing_beyond_it_counts():
    args = small_args(max_seq_len=200, n_layers=2, layer_types=(WINDOW, WINDOW))
    model = random_weights(args)
    held = {}
    for max_len in (60, 200):
        state = model.init_state(2, max_len)
        for _ in range(3):
            model(tokens(args, (2, 20)), state=state)
            state.advance(20)
        held[max_len] = sum(t.numel() for layer in state.layers for t in layer.values())
    assert held[60] == held[200]
    ids = tokens(args, (1, 30))
    other = torch.cat((tokens(args, (1, 10), seed=1), ids[:, 10:]), dim=1)
    reach = 2 * (args.window_size - 1)  # of two layers
    with torch.no_grad():
        changed = (model(ids)[0] - model(other)[0]).abs().amax(dim=-1)[0]
    assert changed[9 + reach] > 1e-4 and changed[10 + reach :].max() < 1e-5


# ---------------------------------------------------------------- equality with transformers


def random_args(seed, **changes):
    """Sizes that share no factor by design; every switch takes each of its values over the seeds."""
    r = random.Random(seed)
    heads, experts, layers = r.choice([2, 3, 4, 6]), r.choice([3, 5, 7]), r.choice([2, 3])
    kinds = tuple(r.choice([WINDOW, FULL]) for _ in range(layers))
    yarn = {"rope_type": "yarn", "rope_factor": r.choice([2.0, 32.0]), "rope_original_max_seq_len": r.choice([8, 20])}
    fields = {
        "vocab_size": r.randrange(53, 131),
        "max_seq_len": 40,
        "dim": r.randrange(17, 60),
        "n_layers": layers,
        "layer_types": kinds if seed % 2 else (),
        "window_size": r.choice([1, 2, 5, 7, 13, 30]),
        "n_heads": heads,
        "n_kv_heads": r.choice([g for g in (1, 2, 3, 4, 6) if heads % g == 0]),
        "head_dim": r.choice([4, 6, 10, 14]),
        "moe_inter_dim": r.randrange(11, 29),
        "n_routed_experts": experts,
        "n_activated_experts": 1 if seed == 5 else r.randrange(2, experts + 1),
        "swiglu_alpha": (1.702, 1.0)[seed // 2 % 2],
        "swiglu_limit": (7.0, 0.8, 1.5)[seed // 2 % 3],
        "aux_loss_weight": (0.5, 0.0)[seed // 3 % 2],
        "norm_eps": (1e-5, 1e-6)[seed % 2],
        "rope_theta": r.choice([150000.0, 10000.0, 1234.5]),
        "tie_embeddings": seed % 2 == 0,
        **(yarn | {"rope_truncate": False}, {"rope_truncate": True}, yarn | {"rope_truncate": True})[seed % 3],
    }
    return GptOssModelArgs(**fields | changes)


def some(seeds, quick):
    """The seeds as parameters, all but the first few of them slow."""
    return [pytest.param(seed, marks=() if i < quick else pytest.mark.slow) for i, seed in enumerate(seeds)]


def their_balance(reference, outputs, token_mask=None):
    """transformers' balance loss, of one layer after another: we take the mean over the layers."""
    from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

    sizes = reference.config.num_local_experts, reference.config.num_experts_per_tok
    losses = [load_balancing_loss_func((logits,), *sizes, token_mask) for logits in outputs.router_logits]
    return reference.config.router_aux_loss_coef * sum(losses) / len(losses)


def loss_with_balance(reference, ids, labels):
    outputs = reference(ids, labels=labels, use_cache=False, output_router_logits=True)
    cross_entropy = outputs.loss - reference.config.router_aux_loss_coef * outputs.aux_loss
    return cross_entropy + their_balance(reference, outputs)


@pytest.mark.parametrize("seed", some(range(12), quick=3))
def test_logits_loss_and_gradients(seed, tmp_path):
    model = random_weights(random_args(seed), seed)
    write(model, tmp_path)
    single = model.args.n_activated_experts == 1 and not model.args.aux_loss_weight  # a softmax over one is 1
    assert_same_numbers(model, tmp_path, seed, loss=loss_with_balance, untrained="router" if single else "^$")


def test_the_sizes_cover_every_switch():
    seen = [random_args(seed) for seed in range(12)]
    assert {a.rope_type for a in seen} == {"default", "yarn"}
    assert {a.rope_truncate for a in seen if a.rope_type == "yarn"} == {True, False}
    assert {a.tie_embeddings for a in seen} == {True, False}
    assert {a.aux_loss_weight > 0 for a in seen} == {True, False}
    assert {kind for a in seen for kind in a.kinds()} == {WINDOW, FULL}
    assert {1, 2} <= {a.window_size for a in seen} and {1, 2, 3} <= {a.n_activated_experts for a in seen}
    assert len({a.swiglu_limit for a in seen}) == 3 and len({a.swiglu_alpha for a in seen}) == 2


@pytest.mark.parametrize("seed", some(range(3), quick=1))
def test_packed_documents(seed, tmp_path):
    """With transformers' own masks for positions that restart (its class makes none): logits and gradients."""
    transformers_or_skip()
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    model = random_weights(random_args(seed, window_size=5), seed)
    write(model, tmp_path)
    reference, lengths = load(tmp_path), (7, 1, 12, 11)
    ids = tokens(model.args, (1, sum(lengths)))
    docs = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], dim=1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    got = model(ids, doc_ids=docs)[0]
    inputs = {"inputs_embeds": model.tok_embed(ids), "attention_mask": None, "past_key_values": None}
    masks = {
        kind: create(config=reference.config, position_ids=positions, **inputs)
        for kind, create in ((FULL, create_causal_mask), (WINDOW, create_sliding_window_causal_mask))
    }
    want = reference(ids, position_ids=positions, attention_mask=masks, use_cache=False).logits
    assert (got - want).abs().max() < 1e-5
    for logits in (got, want):
        logits.square().mean().backward()
    assert_same_gradients(our_gradients(model), their_gradients(reference), 1e-5)


@pytest.mark.parametrize("seed", some((0, 1, 5, 6), quick=1))  # those whose text is varied
def test_256_greedy_tokens(seed, tmp_path):
    model = random_weights(random_args(seed, max_seq_len=300), seed)
    write(model, tmp_path)
    assert_same_text(model, tmp_path)


@pytest.mark.parametrize("seed", some(range(4), quick=1))
def test_import_and_export(seed, tmp_path):
    model = random_weights(random_args(seed), seed)
    write(model, tmp_path)
    assert_same_files(model, tmp_path)


def test_balance_loss_leaves_padding_out(tmp_path):
    model = random_weights(random_args(4, aux_loss_weight=1.0))
    write(model, tmp_path)
    ids = tokens(model.args)
    docs = torch.zeros_like(ids)
    docs[0, 11:] = -1
    reference, token_mask = load(tmp_path), (docs >= 0).long()
    want = their_balance(reference, reference(ids, attention_mask=token_mask, output_router_logits=True), token_mask)
    got = model(ids, targets=ids.masked_fill(docs < 0, -100), doc_ids=docs)[2]["loss/balance"]
    torch.testing.assert_close(got, want, atol=0, rtol=1e-5)
    assert model(ids, targets=ids * 0 - 100, doc_ids=docs * 0 - 1)[1].item() == 0  # nothing but padding


def test_the_published_rotary_frequencies():
    """The ramp of YaRN begins and ends between two pairs."""
    transformers = transformers_or_skip()
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = json.loads((ROOT / "tests/support/published/gpt-oss-120b.json").read_text(encoding="utf-8"))
    args = GptOssModel.hf_layout.model_args(config)
    assert args.windows() == [128, None] * 18
    want, amplitude = ROPE_INIT_FUNCTIONS["yarn"](transformers.AutoConfig.for_model(**config))
    got = rope_frequencies(args.head_dim, args.rope_theta, args)
    assert ((got.float() - want) / want).abs().max() < 1e-5
    assert rope_amplitude(args) == pytest.approx(amplitude, rel=1e-6)
    rounded = replace(args, rope_truncate=True)
    assert not torch.allclose(rope_frequencies(args.head_dim, args.rope_theta, rounded), got)
