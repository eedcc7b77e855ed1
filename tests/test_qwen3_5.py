"""Qwen3.5: equal to transformers' two classes, and its parts to the equations, token by token."""

import itertools
import random
import re

import pytest
import torch
import torch.nn.functional as F

from checks import ModelUnderTest
from checks.harness.float64 import Float64
from engine.inference.generate import generate
from model import ModelError
from model.qwen3_5 import FULL, LINEAR, GatedDeltaNet, MoE, Qwen3_5Model, Qwen3_5ModelArgs, TokenInfo
from tests.support.same_as_transformers import (
    assert_published_names,
    assert_same_files,
    assert_same_numbers,
    assert_same_text,
    random_model,
    read,
    write,
)

NAME = Qwen3_5Model.model_name
TEXT = {  # the keys of Qwen3.5-0.8B's text model
    "model_type": "qwen3_5_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "layer_types": [LINEAR, LINEAR, LINEAR, FULL] * 6,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "vocab_size": 248320,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
    },
}
EXPERTS = {key: value for key, value in TEXT.items() if key != "intermediate_size"} | {  # of Qwen3.5-35B-A3B
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "linear_num_value_heads": 32,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
}


def tiny(**changes):
    return ModelUnderTest(NAME).changed_args(**changes)


def random_args(seed, **changes):
    """Sizes that share no factor by design; every switch takes each of its values; every other one has experts."""
    r = random.Random(seed)
    heads, k_heads = r.choice([2, 3, 4, 6]), r.choice([1, 2, 3])
    types = [LINEAR, FULL, r.choice([LINEAR, FULL])]
    r.shuffle(types)
    head_dim = r.choice([6, 10, 14])
    fields = {
        "vocab_size": r.randrange(53, 131),
        "max_seq_len": 40,
        "n_layers": 4 if seed % 4 == 0 else 3,
        "layer_types": () if seed % 4 == 0 else types,
        "linear_n_k_heads": k_heads,
        "linear_n_v_heads": k_heads * r.choice([1, 2, 3]),
        "linear_k_head_dim": r.choice([4, 7, 12]),
        "linear_v_head_dim": r.choice([5, 8, 11]),
        "conv_size": r.choice([2, 3, 4, 5]),
        "chunk_size": r.choice([4, 7, 16, 64]),
        "n_heads": heads,
        "n_kv_heads": r.choice([g for g in (1, 2, 3, 4, 6) if heads % g == 0]),
        "head_dim": head_dim,
        "qk_rope_head_dim": r.choice([n for n in range(2, 15, 2) if n <= head_dim]),
        "dim": r.randrange(19, 45),
        "tie_embeddings": seed % 3 == 0,
        "rope_theta": r.choice([10000.0, 1e7, 1234.5]),
        "norm_eps": (0.1, 0.05)[seed // 2 % 2],  # small ones amplify the rounding where q and k are nearly orthogonal
        "n_mtp_layers": seed // 2 % 2,
    }
    if seed % 2:
        experts = r.choice([4, 5, 7])
        fields |= {
            "n_routed_experts": experts,
            "n_activated_experts": r.choice([2, 3, experts]),
            "moe_inter_dim": r.randrange(11, 29),
            "shared_inter_dim": r.randrange(11, 29),
        }
    else:
        fields |= {"n_routed_experts": 0, "inter_dim": r.randrange(31, 67)}
    return Qwen3_5ModelArgs(**fields | changes)


def built(args, seed=0):
    """A model whose decays are neither 0 nor 1, and whose queries and keys lean to one side: no sum nearly cancels."""
    model = random_model(args, seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GatedDeltaNet):
                module.A_log.uniform_(-2, 0.5)
                module.dt_bias.uniform_(-3, 1)
                module.conv.weight.abs_()
    return model


def some(seeds, quick):
    """The seeds as parameters, all but the first few of them slow."""
    return [pytest.param(seed, marks=() if seed < quick else pytest.mark.slow) for seed in range(seeds)]


def with_balance(reference, ids, labels):
    """transformers' loss with the one that balances its experts."""
    more = {"output_router_logits": True} if hasattr(reference, "num_experts") else {}
    return reference(ids, labels=labels, use_cache=False, **more).loss


@pytest.mark.parametrize("seed", some(12, quick=4))
def test_logits_loss_and_gradients(seed, tmp_path):
    model = built(random_args(seed), seed)
    write(model, tmp_path)
    if model.mtp is None:
        assert_same_numbers(model, tmp_path, seed, loss=with_balance, untrained="experts")
    else:
        ce = {"our_loss": lambda out: out[2]["loss/ce"]}
        assert_same_numbers(model, tmp_path, seed, **ce, only_ours="^mtp", untrained="experts")


@pytest.mark.parametrize("seed", some(4, quick=2))
def test_256_greedy_tokens(seed, tmp_path):
    model = built(random_args(seed, max_seq_len=300, norm_eps=1e-3), seed)
    write(model, tmp_path)
    assert_same_text(model, tmp_path)


@pytest.mark.parametrize("seed", some(4, quick=2))
def test_import_and_export(seed, tmp_path):
    model = built(random_args(seed, n_mtp_layers=0), seed)
    write(model, tmp_path)
    assert_same_files(model, tmp_path)


@pytest.mark.parametrize("seed", [2, 3])
def test_the_further_module_is_written_and_read(seed, tmp_path):
    model = built(random_args(seed), seed)
    write(model, tmp_path / "ours")
    config, tensors = read(tmp_path / "ours")
    again = Qwen3_5Model.from_hf(config, tensors)
    assert again.args == model.args
    write(again, tmp_path / "again")
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    of_module = {"fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "layers"}
    assert {name.split(".")[1] for name in tensors if name.startswith("mtp.")} == of_module


def test_published_names_and_shapes():
    for config in (TEXT, EXPERTS):
        assert_published_names(Qwen3_5Model, config | {"mtp_num_hidden_layers": 0})


def test_a_checkpoint_that_reads_images_gives_its_text_model():
    model = built(random_args(2, tie_embeddings=True), 2)
    config, tensors = model.to_hf()
    outer = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": config}
    renamed = {re.sub("^model.", "model.language_model.", name): tensor for name, tensor in tensors.items()}
    renamed["model.visual.patch_embed.weight"] = torch.zeros(3)
    again = Qwen3_5Model.from_hf(outer | {"tie_word_embeddings": True}, renamed)
    assert again.args == model.args
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.state_dict().items())


def test_the_sizes_cover_every_switch():
    seen = [random_args(seed) for seed in range(12)]
    for name, values in {"n_mtp_layers": {0, 1}, "tie_embeddings": {True, False}}.items():
        assert {getattr(args, name) for args in seen} == values
        assert {getattr(args, name) for args in seen if args.n_routed_experts} == values
    assert {bool(args.layer_types) for args in seen} == {bool(args.n_routed_experts) for args in seen} == {True, False}
    assert any(args.linear_n_v_heads == args.linear_n_k_heads for args in seen)
    assert any(args.qk_rope_head_dim == args.head_dim for args in seen)


def delta_net_by_token(layer, x):
    """Equation 10 and what is around it, for one sequence (T, D), in float64."""
    a, out, window = layer.args, [], []
    heads, groups = a.linear_n_v_heads, a.linear_n_v_heads // a.linear_n_k_heads
    memory = [torch.zeros(a.linear_k_head_dim, a.linear_v_head_dim) for _ in range(heads)]
    for token in x:
        window = [*window, layer.qkv_proj(token)][-a.conv_size :]
        taps = layer.conv.weight[:, a.conv_size - len(window) :]
        q, k, v = F.silu((torch.stack(window, dim=1) * taps).sum(dim=1)).split(layer.sizes)
        results = []
        for h in range(heads):
            q_h, k_h = (
                part.view(a.linear_n_k_heads, -1)[h // groups]
                / (part.view(a.linear_n_k_heads, -1)[h // groups].square().sum() + 1e-6).sqrt()
                for part in (q, k)
            )
            step = F.softplus(layer.a_proj(token)[h] + layer.dt_bias[h])
            alpha, beta = torch.exp(-layer.A_log[h].exp() * step), layer.b_proj(token)[h].sigmoid()
            erase = torch.eye(a.linear_k_head_dim) - beta * torch.outer(k_h, k_h)
            value = v.view(heads, -1)[h]
            memory[h] = alpha * erase @ memory[h] + beta * torch.outer(k_h, value)
            read_out = memory[h].T @ q_h / a.linear_k_head_dim**0.5
            normed = read_out / (read_out.square().mean() + a.norm_eps).sqrt() * layer.norm.weight
            results.append(normed * F.silu(layer.z_proj(token).view(heads, -1)[h]))
        out.append(layer.o_proj(torch.cat(results)))
    return torch.stack(out), torch.stack(memory)


def test_gated_delta_net_equals_its_equations():
    """Documents of 9, 1 and 8 tokens in one sequence, padding, and a state: all as each document token by token."""
    with Float64(), torch.no_grad():
        torch.manual_seed(0)
        layer = built(tiny()).layers[0].attn.double()
        x = torch.randn(1, 21, 32)
        bounds = [0, 9, 10, 18, 21]
        doc_ids = torch.tensor([[3] * 9 + [4] + [5] * 8 + [-1] * 3])
        packed = layer(x, TokenInfo((), doc_ids=doc_ids))[0]
        for start, end in itertools.pairwise(bounds):
            want, memory = delta_net_by_token(layer, x[0, start:end])
            torch.testing.assert_close(packed[0, start:end], want, rtol=1e-9, atol=1e-10)
        state = built(tiny()).double().init_state(1, 8)
        parts = []
        for part in x[:, 10:18].split((3, 1, 4), dim=1):
            parts.append(layer(part, TokenInfo((), state=state))[0])
            state.advance(part.shape[1])
        want, memory = delta_net_by_token(layer, x[0, 10:18])
        torch.testing.assert_close(torch.cat(parts, dim=1)[0], want, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(state.layers[0]["memory"][0], memory, rtol=1e-9, atol=1e-10)


def test_moe_equals_a_loop_over_tokens():
    args = tiny()
    with Float64(), torch.no_grad():
        torch.manual_seed(0)
        moe = MoE(args)
        for param in moe.parameters():
            torch.nn.init.normal_(param, std=param.shape[-1] ** -0.5)
        x = torch.randn(2, 7, args.dim)
        out, stats = moe(x, TokenInfo(()))
        loads, probabilities = [0] * args.n_routed_experts, torch.zeros(args.n_routed_experts)
        for row, t in itertools.product(range(2), range(7)):
            u = x[row, t]
            p = (moe.router @ u).softmax(dim=0)
            probabilities += p
            chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[: args.n_activated_experts]
            want = torch.zeros(args.dim)
            for e in chosen:
                h = F.silu(moe.gate_proj[e] @ u) * (moe.up_proj[e] @ u)
                want += p[e] / p[chosen].sum() * (moe.down_proj[e] @ h)
                loads[e] += 1
            want += (moe.shared_gate[0] @ u).sigmoid() * moe.shared(u)
            torch.testing.assert_close(out[row, t], want, rtol=1e-9, atol=1e-9)
        assert stats["load"].tolist() == loads
        torch.testing.assert_close(stats["p"], probabilities)


def test_balance_loss_leaves_padding_out():
    """Sequences of 7, 4 and 0 tokens in one padded batch, against the same tokens one after another."""
    model = built(tiny(aux_loss_weight=1.0, n_mtp_layers=0))
    ids = ModelUnderTest(NAME).tokens(3, 7)
    docs = torch.tensor([[0] * n + [-1] * (7 - n) for n in (7, 4, 0)])
    padded = model(ids, ids.roll(-1, 1).masked_fill(docs < 0, -100), doc_ids=docs)[2]
    together = torch.cat((ids[0], ids[1, :4]))[None]
    packed = model(together, together.roll(-1, 1), doc_ids=torch.tensor([[0] * 7 + [1] * 4]))[2]
    torch.testing.assert_close(padded["loss/balance"], packed["loss/balance"])
    assert torch.equal(padded["moe/load"], packed["moe/load"])


@pytest.mark.parametrize("experts", [0, 6])
def test_mtp_loss_equals_the_equations(experts):
    """Equations 21-25 position by position, with ignored targets, document borders and padding."""
    args = tiny(n_routed_experts=experts, max_seq_len=14)
    model = built(args)
    ids = torch.randint(args.vocab_size, (1, 14))
    doc_ids = torch.tensor([[0] * 5 + [1] * 7 + [-1] * 2])
    targets = ids.roll(-1, 1)
    targets[0, [4, 7, 11, 12, 13]] = -100  # the borders, an ignored one, padding
    got = model(ids, targets=targets, doc_ids=doc_ids)[2]["loss/mtp"]

    hidden, losses = [], []
    handle = model.norm.register_forward_hook(lambda module, args, out: hidden.append(out[0]))
    for start, end in ((0, 5), (5, 12)):
        model(ids[:, start:end])
    handle.remove()
    module = model.mtp
    for h, (start, end) in zip(hidden, ((0, 5), (5, 12))):
        n = end - start - 1
        embedded = model.tok_embed(ids[0, start + 1 : end])
        joint = torch.cat((module.embed_norm(embedded), module.hidden_norm(h[:n])), dim=-1)
        x = module.block(module.proj(joint)[None], TokenInfo(model.rotary(torch.arange(n)[None])))[0]
        logits = model.lm_head(module.norm(x))[0]
        losses += [
            -F.log_softmax(logits[i], dim=-1)[targets[0, start + i + 1]]
            for i in range(n)
            if targets[0, start + i + 1] != -100
        ]
    want = args.mtp_loss_weight * torch.stack(losses).sum() / (targets != -100).sum()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


@torch.no_grad()
def test_drafts_are_the_predictions_of_training():
    """Read in parts with a state of its own, the module gives what it gives for the entire sequence."""
    model = built(tiny())
    ids = ModelUnderTest(NAME).tokens(1, 20)
    logits = []
    model.mtp.register_forward_hook(lambda module, args, out: logits.append(model.lm_head(out[0])))
    model(ids, ids.roll(-1, 1))
    trunk, drafts, parts = model.init_state(1), model.init_state(1), []
    hidden = []
    for part in ids.split((7, 1, 3, 9), dim=1):
        model(part, state=trunk)
        hidden.append(trunk.hidden)
        trunk.advance(part.shape[1])
    hidden = torch.cat(hidden, dim=1)
    for start, end in ((0, 7), (7, 8), (8, 10), (10, 19)):
        parts.append(model.draft(hidden[:, start:end], ids[:, start + 1 : end + 1], drafts)[0])
        drafts.advance(end - start)
    torch.testing.assert_close(torch.cat(parts, dim=1), logits[0], rtol=1e-4, atol=1e-4)
    assert drafts.can_rewind() and not trunk.can_rewind()
    assert not drafts.layers[1] and not drafts.layers[2]


@pytest.mark.parametrize("kind", ["draft", "ngram"])
def test_speculation_changes_no_text(kind):
    model = built(tiny(max_seq_len=80))
    prompt = [[3, 5, 7, 3, 5, 7, 3, 5]]
    plain = generate(model, None, prompt, 60, stop_ids=(), temperature=0)
    assert generate(model, None, prompt, 60, stop_ids=(), temperature=0, speculative=kind) == plain


def test_state_of_linear_layers_does_not_grow():
    model = built(tiny(max_seq_len=300))

    def held(max_len):
        state = model.init_state(2, max_len)
        model(torch.zeros(2, 5, dtype=torch.long), state=state)
        return [{name: tuple(tensor.shape) for name, tensor in layer.items()} for layer in state.layers]

    short, long = held(10), held(300)
    assert short[:2] == long[:2] and short[0]["memory"] == (2, 4, 8, 6)
    assert set(short[2]) == {"k", "v"} and long[2]["k"] == (2, 300, 2, 8)


def test_default_sizes_are_the_documented_ones():
    def counts(**changes):
        with torch.device("meta"):
            return Qwen3_5Model(Qwen3_5ModelArgs(**changes)).num_params()

    sparse, dense = counts(), counts(n_routed_experts=0, n_mtp_layers=0)
    assert 180e6 < sparse["total"] < 200e6 and 90e6 < sparse["active"] < 98e6
    assert 100e6 < dense["total"] == dense["active"] < 115e6


def test_kinds_of_layers_are_listed_or_repeated():
    assert tiny(n_layers=12, layer_types=()).mixers == (LINEAR, LINEAR, LINEAR, FULL) * 3
    assert tiny(n_layers=6).mixers == (LINEAR, LINEAR, FULL) * 2
    assert tiny(n_layers=8, layer_types=[LINEAR, LINEAR, LINEAR, FULL]).layer_types == ()  # as usual


@pytest.mark.parametrize(
    "changes",
    [
        {"n_heads": 3},
        {"linear_n_v_heads": 3},
        {"qk_rope_head_dim": 3},
        {"qk_rope_head_dim": 10},
        {"n_activated_experts": 7},
        {"n_mtp_layers": 2},
        {"layer_types": (FULL, LINEAR)},
        {"layer_types": (FULL, FULL, "convolution")},
        {"conv_size": 0},
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes):
    with pytest.raises(ModelError):
        tiny(**changes)
