"""DeepSeek-V4 against transformers' class, and what that lacks against a reading of the equations token by token."""

import itertools
import random

import pytest
import torch

from checks import ModelUnderTest
from checks.harness.float64 import Float64, in_float64
from model import ModelError
from model.deepseekv4 import CSA, HCA, SLIDING, DeepSeekV4Model, DeepSeekV4ModelArgs, StreamMap
from model.layers.compressed import find_windows
from model.layers.routing import token_table
from tests.support.deepseekv4_by_token import ByToken

NAME = DeepSeekV4Model.model_name
KINDS = [(), (CSA, CSA), (HCA, CSA, SLIDING), (CSA, HCA, CSA), (HCA,), (SLIDING, HCA, CSA)]


def random_args(seed, **changes):
    """Sizes that share no factor by design; every switch takes each of its values over twelve seeds."""
    r = random.Random(f"{NAME} {seed}")
    kinds, groups, rope = KINDS[seed % len(KINDS)], r.choice([1, 2, 3]), r.choice([2, 4, 6])
    n_layers = len(kinds) or 3
    fields = {
        "vocab_size": r.randrange(53, 131),
        "max_seq_len": 40,
        "dim": r.randrange(23, 46),
        "n_layers": n_layers,
        "layer_types": kinds,
        "n_heads": groups * r.choice([1, 2, 3]),
        "head_dim": rope + r.choice([0, 3, 5]),
        "qk_rope_head_dim": rope,
        "q_lora_rank": r.choice([11, 14, 19]),
        "o_groups": groups,
        "o_lora_rank": r.choice([5, 7, 8]),
        "window_size": r.choice([1, 4, 7, 40]),
        "csa_ratio": r.choice([2, 3, 4]),
        "hca_ratio": r.choice([3, 5, 8]),
        "index_n_heads": r.choice([8, 9, 11]),  # of fewer, relu leaves ties, which transformers breaks at random
        "index_head_dim": rope + r.choice([0, 2, 5]),
        "index_topk": r.choice([1, 2, 4]),
        "hc_mult": (2, 3, 4)[seed % 3],
        "hc_iters": r.choice([1, 2, 5]),
        "n_hash_layers": (0, 1, n_layers)[seed // 2 % 3],
        "moe_inter_dim": r.randrange(11, 29),
        "n_routed_experts": r.choice([5, 7]),
        "n_activated_experts": r.choice([1, 2, 5]),
        "route_scale": r.choice([1.0, 1.5, 0.7]),
        "swiglu_limit": (0.5, 10.0)[seed % 2],
        "norm_eps": (1e-5, 1e-6)[seed % 2],
        "rope_theta": r.choice([10000.0, 1234.5]),
        "compress_rope_theta": r.choice([160000.0, 999.0]),
        "tie_embeddings": seed % 3 == 0,
    }
    if seed % 2:
        fields |= {"rope_type": "yarn", "rope_factor": r.choice([2.0, 16.0]), "rope_original_max_seq_len": 16}
    return DeepSeekV4ModelArgs(**fields | changes)


@torch.no_grad()
def model_of(args, seed=0):
    """Weights at which every part matters: streams that mix, sinks and biases that count."""
    tested = ModelUnderTest(NAME)
    tested.args = args
    model = tested.build(seed)
    for name, param in model.layers.named_parameters():
        if param.ndim > 1 and "_hc." not in name:
            param.mul_(0.7)
    for module in model.modules():
        if isinstance(module, StreamMap):
            module.bias.normal_()
            module.scale.normal_(1.0, 0.3)
    for layer in model.layers:
        layer.attn.sinks.normal_()
        if layer.ffn.routing_bias is not None:
            layer.ffn.routing_bias.normal_(std=0.1)
    return model


def tiny_model(seed=0, **changes):
    return model_of(ModelUnderTest(NAME).changed_args(**changes), seed)


def tokens(args, *shape, seed=1):
    return torch.randint(args.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- against transformers


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_logits_loss_and_gradients_are_those_of_transformers(seed, tmp_path):
    pytest.importorskip("transformers")
    from tests.support.same_as_transformers import assert_same_files, assert_same_numbers, write

    model = model_of(random_args(seed), seed)
    model.layers[0].attn_hc.requires_grad_(True)  # a gradient there is that of an epsilon
    write(model, tmp_path)
    ce = {"our_loss": lambda out: out[2]["loss/ce"], "untrained": r"\.indexer\.|\.experts\."}
    assert_same_numbers(model, tmp_path, seed, gradients=3e-5, **ce)  # each side is up to 2e-5 off float64
    assert_same_files(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 5])
def test_256_greedy_tokens_are_those_of_transformers(seed, tmp_path):
    pytest.importorskip("transformers")
    from tests.support.same_as_transformers import assert_same_text, write

    model = model_of(random_args(seed, max_seq_len=300, window_size=4), seed)  # their cache fails at a window of 1
    write(model, tmp_path)
    assert_same_text(model, tmp_path)


PUBLISHED = {  # sizes of DeepSeek-V4-Flash in the keys of its own config.json
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 5,  # of 43
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "compress_ratios": [0, 0, 4, 128, 4],
    "compress_rope_theta": 160000,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "num_hash_layers": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "num_nextn_predict_layers": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "tie_word_embeddings": False,
}


def test_published_config_gives_the_published_names_and_shapes():
    pytest.importorskip("transformers")
    from tests.support.same_as_transformers import assert_published_names

    assert_published_names(DeepSeekV4Model, PUBLISHED)
    args = DeepSeekV4Model.hf_layout.model_args(PUBLISHED)
    assert args.kinds() == (SLIDING, SLIDING, CSA, HCA, CSA) and args.layer_types == ()  # they are the usual ones
    assert (args.n_hash_layers, args.qk_rope_head_dim, args.rope_theta) == (3, 64, 10000.0)
    assert (args.rope_factor, args.compress_rope_theta, args.csa_ratio, args.hca_ratio) == (16.0, 160000.0, 4, 128)


def test_experts_by_table_must_come_first():
    config = {**PUBLISHED, "mlp_layer_types": ["moe", "hash_moe", "moe", "moe", "moe"]}
    with pytest.raises(ModelError, match="mlp_layer_types"):
        DeepSeekV4Model.hf_layout.model_args(config)


# ---------------------------------------------------------------- against the equations, token by token, in float64


def by_token(model, ids):
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return ByToken(model.args, weights, ids)


DOCUMENTS = [[4] * 7 + [5] * 9 + [-1], [2] * 1 + [3] * 5 + [9] * 11]


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_packed_documents_indexer_and_gradients_equal_the_equations(seed):
    """Logits, KL and its gradient: borders inside windows of both kinds, a document of one token, padding."""
    kinds = {"n_layers": 3, "layer_types": (CSA, SLIDING, HCA), "n_hash_layers": 1}
    sizes = {"index_topk": 2, "window_size": 4, "csa_ratio": 2, "hca_ratio": 3}
    args = random_args(seed, **kinds, **sizes, rope_type="default", rope_factor=1.0)
    docs = torch.tensor(DOCUMENTS)
    ids = tokens(args, *docs.shape)
    with Float64():
        model = in_float64(lambda: model_of(args, seed), ids)
        logits = model(ids, doc_ids=docs)[0]
        terms = model(ids, ids.roll(-1, 1), doc_ids=docs)[2]
        terms["loss/index"].backward()
        got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert got and all(".indexer." in name for name in got)  # nothing else learns from it
    model.zero_grad()
    total, count = 0.0, 0
    for row, (sequence, names) in enumerate(zip(ids, docs, strict=True)):
        for doc in names.unique().tolist():
            at = (names == doc).nonzero()[:, 0]
            if doc < 0:
                continue
            want = by_token(model, sequence[at].tolist())
            torch.testing.assert_close(logits[row, at], want.logits, atol=1e-10, rtol=1e-10)
            total = total + sum(kl for layer in want.kl.values() for kl in layer)
            count += len(at)
    loss = args.index_loss_weight * total / count
    assert abs(terms["loss/index"].item() - loss.item()) < 1e-10
    loss.backward()
    for name, grad in got.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, atol=1e-10, rtol=1e-9)


def test_chunks_and_steps_equal_the_equations():
    """One text in uneven chunks, another in single steps, next to each other at unequal positions; in float64."""
    args = ModelUnderTest(NAME).changed_args()
    texts = [tokens(args, 19, seed=5).tolist(), tokens(args, 14, seed=6).tolist()]
    model = in_float64(tiny_model, torch.tensor([texts[1]]))
    with Float64(), torch.no_grad():
        wants = [by_token(model, text).logits for text in texts]
        batch = model.init_state(2)
        for row, (text, sizes) in enumerate(zip(texts, ([7, 1, 3], [1, 1, 4]))):
            alone, done = model.init_state(1), 0
            for size in sizes:
                got = model(torch.tensor([text[done : done + size]]), state=alone)[0][0]
                alone.advance(size)
                torch.testing.assert_close(got, wants[row][done : done + size], atol=1e-10, rtol=1e-10)
                done += size
            batch.overwrite([row], alone)
        places = [11, 6]
        for size in (1, 2, 1, 3, 1):
            ids = torch.tensor([text[at : at + size] for text, at in zip(texts, places)])
            got = model(ids, state=batch)[0]
            batch.advance(size)
            for row, at in enumerate(places):
                torch.testing.assert_close(got[row], wants[row][at : at + size], atol=1e-10, rtol=1e-10)
            places = [at + size for at in places]


# ---------------------------------------------------------------- parts


@torch.no_grad()
def test_rewinding_forgets_tokens_exactly():
    """A wrong continuation that closes windows of both kinds, then the right one."""
    model = tiny_model()
    ids, wrong = tokens(model.args, 2, 24), tokens(model.args, 2, 8, seed=9)
    want = model(ids)[0]
    for start in range(1, 15):
        state = model.init_state(2)
        model(ids[:, :start], state=state)
        state.advance(start)
        assert state.can_rewind()
        model(wrong, state=state)
        state.advance(8)
        state.rewind(8)
        got = model(ids[:, start:], state=state)[0]
        torch.testing.assert_close(got, want[:, start:], atol=1e-4, rtol=1e-4)


def test_the_state_holds_a_window_entries_and_tails():
    model = tiny_model()
    a, state = model.args, model.init_state(1, 20)
    model(tokens(a, 1, 9), state=state)
    sizes = [{name: tuple(tensor.shape[1:]) for name, tensor in layer.items()} for layer in state.layers]
    kv, room = {"kv": (a.window_size + state.room, 1, a.head_dim)}, state.room
    inputs = (2 * a.csa_ratio + room, 2, 2, a.head_dim)
    index = {"index": (12, a.index_head_dim), "index_inputs": (2 * a.csa_ratio + room, 2, 2, a.index_head_dim)}
    assert sizes[0] == kv
    assert sizes[1] == kv | {"entries": (12, a.head_dim), "entries_inputs": inputs} | index
    assert sizes[2] == kv | {"entries": (9, a.head_dim), "entries_inputs": (a.hca_ratio + room, 2, 1, a.head_dim)}


@pytest.mark.parametrize("ratio", [1, 2, 3, 5])
def test_windows_equal_a_count(ratio):
    """Which windows close where, and who sees them, over documents of 1 to 8 tokens."""
    lengths = [1, 4, 8, 2, 5, 3]
    docs = torch.tensor(
        [[d for d, n in enumerate(order) for _ in range(lengths[n])] for order in (range(6), (3, 5, 0, 1, 2, 4))]
    )
    n_tokens = docs.shape[1]
    positions = torch.arange(n_tokens)[None]
    got = find_windows(positions, ratio, lambda starts: starts, doc_ids=docs)
    for row, names in enumerate(docs.tolist()):
        ends, numbers = [], []
        for doc, group in itertools.groupby(range(n_tokens), key=lambda t, n=names: n[t]):
            members = list(group)
            for w in range(len(members) // ratio):
                ends.append(members[(w + 1) * ratio - 1])
                numbers.append((w, members[w * ratio], doc))
        n = len(ends)
        assert got.last[row, :n].tolist() == ends and (got.last[row, n:] == n_tokens).all()
        assert got.number[row, :n].tolist() == [w for w, _, _ in numbers]
        assert got.rope[row, :n].tolist() == [start for _, start, _ in numbers]
        for t in range(n_tokens):
            want = [i for i, end in enumerate(ends) if end <= t and numbers[i][2] == names[t]]
            assert got.visible[row, t].nonzero()[:, 0].tolist() == want


@pytest.mark.parametrize("n_active", [1, 2, 5, 7])
def test_a_table_of_experts_is_even(n_active):
    table = token_table(7 * 60, n_active, 7)
    assert table.shape == (420, n_active) and all(len(set(row)) == n_active for row in table.tolist())
    for column in table.T:
        assert column.bincount(minlength=7).tolist() == [60] * 7
    assert len({tuple(row) for row in table.tolist()}) >= 7 * min(n_active, 2)
    assert token_table(5, 2, 7).max() < 7


def test_streams_start_near_a_plain_residual_connection():
    model = DeepSeekV4Model(DeepSeekV4ModelArgs.tiny()).train()
    ids = tokens(model.args, 2, 24)
    outputs = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _module, _inputs, out: outputs.append(out[0]))
    other_vars = model(ids, ids)[2]
    assert other_vars["streams/mixed"].shape == (3, 2) and other_vars["streams/mixed"].max() < 0.01
    for x in outputs:  # all streams hold nearly the same
        assert (x - x.mean(dim=2, keepdim=True)).norm() < 0.05 * x.norm()


def test_sinkhorn_gives_doubly_stochastic_matrices():
    model = tiny_model(hc_mult=4, hc_iters=30)
    hc, x = model.layers[1].attn_hc, torch.randn(2, 3, 4, model.args.dim)
    ones = torch.ones(2, 3, 4, model.args.dim)  # mixed, equal streams stay as they are: columns sum to 1
    out = torch.zeros(2, 3, model.args.dim)
    raw = torch.randn(2, 3, 16)
    hc.res.forward = lambda _x: raw
    torch.testing.assert_close(hc.write(ones, out)[0], ones, atol=1e-4, rtol=0)
    torch.testing.assert_close(hc.write(x, out)[0].sum(dim=2), x.sum(dim=2), atol=1e-3, rtol=1e-3)  # and so do rows


def test_indexer_is_frozen_without_its_loss_and_learns_alone_with_it():
    frozen, model = tiny_model(index_loss_weight=0.0).train(), tiny_model().train()
    ids = tokens(model.args, 2, 24)
    assert not any(p.requires_grad for p in frozen.layers[1].attn.indexer.parameters())
    assert "loss/index" in model(ids, ids)[2]
    model(ids, ids)[2]["loss/ce"].backward()
    assert all(p.grad is None for p in model.layers[1].attn.indexer.parameters())
    optimizer = torch.optim.Adam(model.layers[1].attn.indexer.parameters(), lr=1e-2)
    kls = []
    for _ in range(40):
        optimizer.zero_grad()
        terms = model(ids, ids)[2]
        terms["loss/index"].backward()
        optimizer.step()
        kls.append(terms["index/kl"].item())
    assert kls[-1] < 0.5 * kls[0]


def test_no_target_and_no_entry_give_finite_gradients():
    """Texts too short for an entry, padding alone, and router scores that are far below zero."""
    model = tiny_model().train()
    with torch.no_grad():
        model.layers[2].ffn.router.mul_(1e4)
    for length, doc in ((1, 0), (1, -1), (2, 0), (5, -1), (7, 0)):
        model.zero_grad()
        ids = tokens(model.args, 2, length)
        docs = torch.full_like(ids, doc)
        model(ids, ids.masked_fill(docs < 0, -100), doc_ids=docs)[1].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_default_sizes_are_the_documented_ones():
    with torch.device("meta"):
        counts = DeepSeekV4Model(DeepSeekV4ModelArgs()).num_params()
    assert 155e6 < counts["total"] < 175e6 and 72e6 < counts["active"] < 90e6
