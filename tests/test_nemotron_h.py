"""Nemotron-H: equal to transformers' class, and its parts to the equations, token by token."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from checks import ModelUnderTest
from checks.harness.float64 import Float64
from engine.inference.generate import generate
from model import ModelError
from model.layers.routing import choose_experts
from model.nemotron_h import (
    ATTENTION,
    KINDS,
    MAMBA,
    MLP,
    MOE,
    Mamba2,
    MoE,
    NemotronHModel,
    NemotronHModelArgs,
    TokenInfo,
)
from tests.support.same_as_transformers import (
    assert_published_names,
    assert_same_files,
    assert_same_numbers,
    assert_same_text,
    load,
    random_model,
    read,
    their_loss,
    write,
)

NAME = NemotronHModel.model_name
NANO = {  # sizes of Nemotron 3 Nano in the keys of its config.json
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "attention_bias": False,
    "chunk_size": 128,
    "conv_kernel": 4,
    "expand": 2,
    "head_dim": 128,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "intermediate_size": 1856,
    "layer_norm_epsilon": 1e-5,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 64,
    "mamba_proj_bias": False,
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1,
    "n_groups": 8,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 52,
    "num_key_value_heads": 2,
    "routed_scaling_factor": 2.5,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "topk_group": 1,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 131072,
}
LATENT = NANO | {"hybrid_override_pattern": "MEM*E-", "moe_latent_size": 1024}  # as in Nemotron 3 Super


def tiny(**changes):
    return ModelUnderTest(NAME).changed_args(**changes)


def random_args(seed, **changes):
    """Sizes that share no factor by design; every switch takes each of its values, each kind of block occurs."""
    r = random.Random(seed)
    heads, groups = r.choice([2, 3, 4, 6]), r.choice([1, 2, 3])
    of_experts, limited = [(1, 1), (2, 1), (3, 2), (1, 1)][seed % 4]
    types = [*KINDS, MAMBA]
    r.shuffle(types)
    dense = seed % 6 == 5
    fields = {
        "vocab_size": r.randrange(53, 131),
        "max_seq_len": 40,
        "n_layers": 6 if seed % 3 == 0 or dense else 5,
        "layer_types": () if seed % 3 == 0 or dense else types,
        "mamba_n_heads": groups * r.choice([1, 2, 3]),
        "mamba_n_groups": groups,
        "mamba_head_dim": r.choice([5, 8, 11]),
        "mamba_state_dim": r.choice([4, 7, 11]),
        "conv_size": r.choice([2, 3, 4, 5]),
        "chunk_size": r.choice([4, 7, 16, 64]),
        "time_step_min": (0.0, 0.05)[seed // 2 % 2],
        "n_heads": heads,
        "n_kv_heads": r.choice([g for g in (1, 2, 3, 4, 6) if heads % g == 0]),
        "head_dim": r.choice([5, 6, 10]),
        "dim": r.randrange(19, 45),
        "inter_dim": r.randrange(31, 67),
        "n_routed_experts": 0 if dense else (r.choice([5, 7]) if of_experts == 1 else of_experts * r.choice([2, 3])),
        "n_activated_experts": r.choice([2, 3]) if of_experts == 1 else 2,
        "n_expert_groups": of_experts,
        "n_limited_groups": limited,
        "norm_topk": seed // 2 % 2 == 0,
        "route_scale": (2.5, 1.0, 0.7)[seed % 3],
        "moe_inter_dim": r.randrange(11, 29),
        "moe_latent_dim": (0, 9, 14)[seed // 2 % 3],
        "shared_inter_dim": r.randrange(11, 29),
        "norm_eps": (0.1, 0.03)[seed // 2 % 2],  # small ones amplify the rounding of the gated norm
        "tie_embeddings": seed % 4 == 1,
    }
    return NemotronHModelArgs(**fields | changes)


def built(args, seed=0):
    """A model whose decays are neither 0 nor 1, and whose B, C and x lean to one side: no sum nearly cancels."""
    model = random_model(args, seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Mamba2):
                module.A_log.uniform_(-2, 1)
                module.dt_bias.uniform_(-3, 1)
                module.D.uniform_(0.5, 2)
                module.conv.weight.abs_()
                module.conv.bias.normal_(std=0.3)
    return model


def some(seeds, quick):
    """The seeds as parameters, all but the first few of them slow."""
    return [pytest.param(seed, marks=() if seed < quick else pytest.mark.slow) for seed in range(seeds)]


def tied(reference, ids, labels):
    """transformers' loss with its output head tied to the embeddings, which no config.json can ask it for."""
    reference.lm_head.weight = reference.model.embeddings.weight
    return their_loss(reference, ids, labels)


@pytest.mark.parametrize("seed", some(12, quick=3))
def test_logits_loss_and_gradients(seed, tmp_path):
    model = built(random_args(seed), seed)
    write(model, tmp_path)
    loss = {"loss": tied, "only_ours": "^lm_head"} if model.args.tie_embeddings else {}
    ce = {"our_loss": lambda out: out[2]["loss/ce"]}
    assert_same_numbers(model, tmp_path, seed, **ce, **loss, untrained="experts")


@pytest.mark.parametrize("seed", some(4, quick=1))
def test_256_greedy_tokens(seed, tmp_path):
    model = built(random_args(seed, max_seq_len=300, time_step_min=0.0), seed)
    write(model, tmp_path)
    assert_same_text(model, tmp_path)


@pytest.mark.parametrize("seed", some(6, quick=2))
def test_import_and_export(seed, tmp_path):
    model = built(random_args(seed), seed)
    write(model, tmp_path)
    assert_same_files(model, tmp_path)


def test_published_names_and_shapes():
    for config in (NANO, LATENT):
        assert_published_names(NemotronHModel, config)
    args = NemotronHModel.hf_layout.model_args(NANO)
    assert [args.kinds.count(kind) for kind in KINDS] == [23, 6, 23, 0] and args.n_layers == 52
    assert NemotronHModel.hf_layout.model_args(LATENT).kinds == (MAMBA, MOE, MAMBA, ATTENTION, MOE, MLP)


def test_a_least_time_step_is_read_where_the_class_has_one():
    """NVIDIA's code uses time_step_min for start values alone, transformers bounds the step by it as well."""
    read_args = NemotronHModel.hf_layout.model_args
    assert read_args(NANO).time_step_min == 0
    saved = {key: value for key, value in NANO.items() if key != "hybrid_override_pattern"}
    assert read_args(saved | {"layers_block_type": ["mamba", "moe", "attention"]}).time_step_min == 0.001
    assert read_args(saved | {"layers_block_type": ["mamba"]}).kinds == (MAMBA,)


def test_a_separate_output_head_is_kept(tmp_path):
    """transformers never ties it, so a checkpoint that announces a tied one may hold two."""
    model = built(random_args(1), 1)
    write(model, tmp_path)
    config, tensors = read(tmp_path)
    assert torch.equal(tensors["lm_head.weight"], tensors["backbone.embeddings.weight"])
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    again = NemotronHModel.from_hf(config, tensors)
    assert not again.args.tie_embeddings and torch.equal(again.lm_head.weight, tensors["lm_head.weight"])


def test_the_sizes_cover_every_switch():
    seen = [random_args(seed) for seed in range(12)]
    for switch in ("tie_embeddings", "norm_topk"):
        assert {getattr(args, switch) for args in seen} == {True, False}
    for name in ("moe_latent_dim", "time_step_min", "n_routed_experts", "layer_types"):
        assert {bool(getattr(args, name)) for args in seen} == {True, False}
    assert {args.n_expert_groups for args in seen if args.n_routed_experts} == {1, 2, 3}
    assert {kind for args in seen for kind in args.kinds} == {*KINDS}


def test_usual_kinds():
    kinds = NemotronHModelArgs().kinds
    assert [kinds.count(kind) for kind in KINDS] == [9, 3, 12, 0] and kinds[0] == MAMBA and kinds[-1] == MOE
    assert all(kinds[i + 1] == MOE for i, kind in enumerate(kinds) if kind == ATTENTION)
    assert NemotronHModelArgs(n_routed_experts=0, n_layers=4).kinds == (MAMBA, MLP, MAMBA, MLP)
    assert NemotronHModelArgs(n_layers=2, layer_types=(MAMBA, MOE)) == NemotronHModelArgs(n_layers=2)


def mamba_by_token(layer, x, initial=None):
    """The equations of Mamba-2 for one sequence (T, D), in float64."""
    a, out, window = layer.args, [], []
    heads, per_group = a.mamba_n_heads, a.mamba_n_heads // a.mamba_n_groups
    memory = [torch.zeros(a.mamba_state_dim, a.mamba_head_dim) for _ in range(heads)]
    for token in x:
        window = [*window, layer.xbc_proj(token)][-a.conv_size :]
        taps = layer.conv.weight[:, a.conv_size - len(window) :]
        xbc = F.silu((torch.stack(window, dim=1) * taps).sum(dim=1) + layer.conv.bias)
        x_t, b_t, c_t = xbc.split(layer.sizes)
        y = []
        for h in range(heads):
            step = F.softplus(layer.dt_proj(token)[h] + layer.dt_bias[h]).clamp(min=a.time_step_min)
            x_h = x_t.view(heads, -1)[h]
            b_h, c_h = (part.view(a.mamba_n_groups, -1)[h // per_group] for part in (b_t, c_t))
            memory[h] = torch.exp(-layer.A_log[h].exp() * step) * memory[h] + step * torch.outer(b_h, x_h)
            y.append(memory[h].T @ c_h + layer.D[h] * x_h)
        gated = (torch.cat(y) * F.silu(layer.z_proj(token))).view(a.mamba_n_groups, -1)
        normed = gated / (gated.square().mean(dim=1, keepdim=True) + a.norm_eps).sqrt()
        out.append(layer.o_proj(normed.flatten() * layer.norm.weight))
    return torch.stack(out), torch.stack(memory)


@pytest.mark.parametrize("time_step_min", [0.0, 0.2])
def test_mamba_equals_its_equations(time_step_min):
    """Documents of 9, 1 and 8 tokens in one sequence, padding, and a state: all as each document token by token."""
    with Float64(), torch.no_grad():
        torch.manual_seed(0)
        model = built(tiny(time_step_min=time_step_min)).double()
        layer = model.layers[0].mixer
        layer.A_log[0], layer.A_log[1] = 5.0, -9.0  # forgets at once; never forgets
        x = torch.randn(1, 21, 32)
        doc_ids = torch.tensor([[3] * 9 + [4] + [5] * 8 + [-1] * 3])
        packed = layer(x, TokenInfo(doc_ids=doc_ids))[0]
        for start, end in itertools.pairwise([0, 9, 10, 18, 21]):
            want, memory = mamba_by_token(layer, x[0, start:end])
            torch.testing.assert_close(packed[0, start:end], want, rtol=1e-9, atol=1e-10)
        state, parts = model.init_state(1, 8), []
        for part in x[:, 10:18].split((3, 1, 4), dim=1):
            parts.append(layer(part, TokenInfo(state=state))[0])
            state.advance(part.shape[1])
        want, memory = mamba_by_token(layer, x[0, 10:18])
        torch.testing.assert_close(torch.cat(parts, dim=1)[0], want, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(state.layers[0]["memory"][0], memory, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("changes", [{}, {"moe_latent_dim": 0, "n_expert_groups": 1, "n_limited_groups": 1}])
def test_moe_equals_a_loop_over_tokens(changes):
    args = tiny(**changes)
    with Float64(), torch.no_grad():
        torch.manual_seed(0)
        moe = MoE(args)
        for param in moe.parameters():
            torch.nn.init.normal_(param, std=param.shape[-1] ** -0.5)
        moe.routing_bias.normal_(std=0.1)
        x = torch.randn(2, 7, args.dim)
        out, stats = moe(x, TokenInfo())
        loads, size = [0] * args.n_routed_experts, args.n_routed_experts // args.n_expert_groups
        for row, t in itertools.product(range(2), range(7)):
            u = x[row, t]
            affinity = (moe.router @ u).sigmoid()
            score = (affinity + moe.routing_bias).tolist()
            groups = [range(i, i + size) for i in range(0, args.n_routed_experts, size)]
            groups.sort(key=lambda group: -sum(sorted(score[e] for e in group)[-2:]))
            allowed = [e for group in groups[: args.n_limited_groups] for e in group]
            chosen = sorted(allowed, key=lambda e: -score[e])[: args.n_activated_experts]
            latent = moe.latent_in(u)
            routed = torch.zeros_like(latent)
            for e in chosen:
                h = (moe.up_proj[e] @ latent).clamp(min=0) ** 2
                routed += args.route_scale * affinity[e] / affinity[chosen].sum() * (moe.down_proj[e] @ h)
                loads[e] += 1
            shared = moe.shared.down_proj.weight @ (moe.shared.up_proj.weight @ u).clamp(min=0) ** 2
            torch.testing.assert_close(out[row, t], moe.latent_out(routed) + shared, rtol=1e-9, atol=1e-9)
        assert stats["moe/load"].tolist() == loads


def test_experts_come_from_the_best_groups():
    score = torch.tensor([[0.9, 0.0, 0.5, 0.6, 0.4, 0.3]])  # the best expert is in no group of the best two
    assert sorted(choose_experts(score, 2, 3, 1)[0].tolist()) == [2, 3]
    assert sorted(choose_experts(score, 2, 3, 2)[0].tolist()) == [0, 3]
    assert sorted(choose_experts(score, 2)[0].tolist()) == [0, 3]


def test_order_comes_from_mamba_alone():
    """Attention has no positions: without Mamba-2 the last token's output is the same for every order of the others."""
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 1, 9, 4, 3, 2, 1, 6]])
    for kinds, equal in (((ATTENTION, MLP), True), ((MAMBA, MLP), False)):
        model = built(tiny(n_layers=2, layer_types=kinds))
        with torch.no_grad():
            one, other = model(ids)[0][:, -1]
        assert torch.allclose(one, other, atol=1e-5) == equal


@pytest.mark.parametrize("time_step_min", [0.0, 0.3])
def test_a_least_time_step_holds_in_decoding_too(time_step_min, tmp_path):
    """transformers bounds the step in the full forward alone, so that its own decoding differs from it."""
    args = tiny(time_step_min=time_step_min, max_seq_len=40, n_layers=3, layer_types=(MAMBA, MLP, ATTENTION))
    model = built(args)
    with torch.no_grad():
        model.layers[0].mixer.dt_bias.fill_(-4)
    write(model, tmp_path)
    reference, ids = load(tmp_path), ModelUnderTest(NAME).tokens(1, 20)
    state, steps = model.init_state(1), []
    with torch.no_grad():
        full, theirs = model(ids)[0], reference(ids).logits
        for token in ids.split(1, dim=1):
            steps.append(model(token, state=state)[0])
            state.advance(1)
        before = reference(ids[:, :10], use_cache=True).past_key_values
        cached = reference(ids[:, 10:11], past_key_values=before, use_cache=True).logits[:, 0]
    torch.testing.assert_close(full, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-5, atol=1e-5)
    assert torch.allclose(cached, full[:, 10], atol=1e-4) == (time_step_min == 0)


@pytest.mark.parametrize("kind", ["ngram"])
def test_speculation_changes_no_text(kind):
    model = built(tiny(max_seq_len=80))
    prompt = [[3, 5, 7, 3, 5, 7, 3, 5]]
    plain = generate(model, None, prompt, 60, stop_ids=(), temperature=0)
    assert generate(model, None, prompt, 60, stop_ids=(), temperature=0, speculative=kind) == plain


def test_state_of_mamba_does_not_grow():
    model = built(tiny(max_seq_len=300))

    def held(max_len):
        state = model.init_state(2, max_len)
        model(torch.zeros(2, 5, dtype=torch.long), state=state)
        return [{name: tuple(tensor.shape) for name, tensor in layer.items()} for layer in state.layers]

    short, long = held(10), held(300)
    assert short[0] == long[0] and short[0]["memory"] == (2, 4, 8, 6)
    assert [bool(layer) for layer in short] == [True, False, True, False, True, False]
    assert long[4]["k"] == (2, 300, 2, 8)


def test_what_is_logged():
    model = built(tiny())
    out = model(torch.arange(12)[None], targets=torch.arange(12)[None])[2]
    assert out["moe/load"].shape == (2, 6) and out["ffn/active"].shape == (3,)
    assert out["mamba/step"].shape == out["mamba/decay"].shape == (2, 4)
    for name in ("mamba/decay", "ffn/active"):
        assert ((out[name] > 0) & (out[name] < 1)).all()


def test_default_sizes_are_the_documented_ones():
    def counts(**changes):
        with torch.device("meta"):
            return NemotronHModel(NemotronHModelArgs(**changes)).num_params()

    sparse, dense = counts(), counts(n_routed_experts=0)
    assert 185e6 < sparse["total"] < 195e6 and 100e6 < sparse["active"] < 110e6
    assert 115e6 < dense["total"] == dense["active"] < 125e6
    latent = counts(moe_latent_dim=384, n_routed_experts=16, n_activated_experts=4)
    assert abs(latent["total"] / sparse["total"] - 1) < 0.05


@pytest.mark.parametrize(
    "changes",
    [
        {"n_heads": 3},
        {"mamba_n_heads": 3},
        {"n_activated_experts": 5},
        {"n_limited_groups": 4},
        {"n_expert_groups": 4},
        {"n_expert_groups": 6, "n_limited_groups": 6},
        {"n_routed_experts": 0},
        {"layer_types": (MAMBA,)},
        {"layer_types": ("mamba",) * 6},
        {"conv_size": 0},
        {"shared_inter_dim": 0},
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes):
    with pytest.raises(ModelError) as error:
        tiny(**changes)
    assert "\n" not in str(error.value)
