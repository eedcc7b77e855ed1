"""DeepSeek-V3's equations, each against a loop over tokens in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from checks import ModelUnderTest
from model.deepseekv3 import DeepSeekV3Model, DeepSeekV3ModelArgs, MoE, TokenInfo

NAME = DeepSeekV3Model.model_name
TRAINING = TokenInfo(rope=None)  # of a MoE: no padding, no state


def small_args(**changes):
    args = ModelUnderTest(NAME).args
    return DeepSeekV3ModelArgs(**{**vars(args), **changes})


def unit_gain_model(args, seed=0):
    tested = ModelUnderTest(NAME)
    tested.args = args
    return tested.build(seed)


def random_moe(args, seed=0):
    torch.manual_seed(seed)
    moe = MoE(args).double()
    for param in moe.parameters():
        torch.nn.init.normal_(param, std=param.shape[-1] ** -0.5)
    moe.routing_bias.normal_(std=0.2)
    return moe


def swiglu(x, gate, up, down):
    return down @ (F.silu(gate @ x) * (up @ x))


def choose_by_loop(affinity, bias, args):
    """Equation 16 with the node-limited choice of 2.1.2, for one token, with sorted() instead of topk."""
    score = [a + b for a, b in zip(affinity.tolist(), bias.tolist())]
    size = args.n_routed_experts // args.n_expert_groups
    groups = [range(g * size, (g + 1) * size) for g in range(args.n_expert_groups)]
    if args.n_limited_groups < args.n_expert_groups:
        groups.sort(key=lambda g: -sum(sorted((score[e] for e in g), reverse=True)[:2]))
        groups = groups[: args.n_limited_groups]
    allowed = sorted(itertools.chain(*groups), key=lambda e: -score[e])
    return allowed[: args.n_activated_experts]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_expert_groups": 1, "n_limited_groups": 1},
        {"norm_topk": False, "route_scale": 2.5},
        {"n_shared_experts": 0},
        {"n_shared_experts": 2, "n_activated_experts": 1},
    ],
)
def test_moe_equals_a_loop_over_tokens(changes):
    args = small_args(**changes)
    moe = random_moe(args)
    x = torch.randn(2, 7, args.dim, dtype=torch.double)
    out, load, balance = moe(x, TRAINING)

    loads = [0] * args.n_routed_experts
    row_losses = []
    for row in range(2):
        f, p = [0.0] * args.n_routed_experts, [0.0] * args.n_routed_experts
        for t in range(7):
            u = x[row, t]
            affinity = (moe.router @ u).sigmoid()
            chosen = choose_by_loop(affinity, moe.routing_bias, args)
            total = sum(affinity[e] for e in chosen) if args.norm_topk else 1.0
            want = torch.zeros(args.dim, dtype=torch.double)
            for e in chosen:
                gate = args.route_scale * affinity[e] / total
                want += gate * swiglu(u, moe.gate_proj[e], moe.up_proj[e], moe.down_proj[e])
                loads[e] += 1
            if args.n_shared_experts:
                s = moe.shared
                want += swiglu(u, s.gate_proj.weight, s.up_proj.weight, s.down_proj.weight)
            # Routing is computed in fp32, so the weights agree to fp32.
            torch.testing.assert_close(out[row, t], want, atol=1e-5, rtol=1e-5)
            top = sorted(range(args.n_routed_experts), key=lambda e: -affinity[e].item())[: args.n_activated_experts]
            for e in range(args.n_routed_experts):
                f[e] += args.n_routed_experts / (args.n_activated_experts * 7) * (e in top)  # equation 18
                p[e] += (affinity[e] / affinity.sum()).item() / 7  # equations 19-20
        row_losses.append(args.seq_aux_alpha * sum(a * b for a, b in zip(f, p)))  # equation 17
    assert load.tolist() == loads
    assert balance.item() == pytest.approx(sum(row_losses) / 2, rel=1e-5)


def test_padding_counts_in_no_load_and_no_balance_loss():
    """Sequences of 7, 4 and 0 tokens in one padded batch, against each without padding."""
    args, lengths = small_args(seq_aux_alpha=1.0), (7, 4, 0)
    model = unit_gain_model(args)
    ids = torch.randint(args.vocab_size, (3, 7), generator=torch.Generator().manual_seed(5))
    docs = torch.tensor([[0] * n + [-1] * (7 - n) for n in lengths])
    targets = ids.roll(-1, 1).masked_fill(docs < 0, -100)
    logits = model(ids, doc_ids=docs)[0]
    _, loss, got = model(ids, targets, doc_ids=docs)
    loss.backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    model.mtp = torch.nn.ModuleList()
    alone = [model(row[None, :n], target[None, :n])[2] for row, target, n in zip(ids, targets, lengths) if n]
    assert torch.equal(got["moe/load"], sum(terms["moe/load"] for terms in alone))
    assert got["moe/load_mtp"].sum().item() == args.n_activated_experts * (
        6 + 4
    )  # no position for the last token of a sequence
    got, plain, no_padding = (model(ids, targets, doc_ids=d)[2] for d in (docs, None, docs * 0))
    want = sum(terms["loss/balance"] for terms in alone) / 3
    torch.testing.assert_close(got["loss/balance"], want)
    assert torch.equal(plain["moe/load"], no_padding["moe/load"])
    assert not torch.equal(plain["moe/load"], got["moe/load"])
    torch.testing.assert_close(plain["loss/balance"], no_padding["loss/balance"])


def test_the_routing_bias_changes_the_choice_and_no_weight():
    args = small_args(n_expert_groups=1, n_limited_groups=1, n_activated_experts=6, n_routed_experts=6)
    moe = random_moe(args)
    x = torch.randn(1, 5, args.dim, dtype=torch.double)
    before = moe(x, TRAINING)[0]
    moe.routing_bias.normal_(std=5.0)  # with every expert chosen anyway, the bias has nothing left to do
    torch.testing.assert_close(moe(x, TRAINING)[0], before)


def test_bias_moves_by_gamma_against_the_load():
    args = small_args(bias_update_speed=0.25)
    model = DeepSeekV3Model(args)
    n_moe = args.n_layers - args.n_dense_layers
    load = torch.tensor([[5.0, 0.0, 2.0, 2.0, 3.0, 0.0]] * n_moe)  # mean 2
    model.after_step({"moe/load": load, "moe/load_mtp": load[:1] * 0 + 1})
    for layer in model.layers[args.n_dense_layers :]:
        assert layer.ffn.routing_bias.tolist() == [-0.25, 0.25, 0.0, 0.0, -0.25, 0.25]
    assert model.mtp[0].block.ffn.routing_bias.tolist() == [0.0] * 6


@pytest.mark.parametrize("depths", [1, 2])
def test_mtp_loss_equals_the_equations(depths):
    """Equations 21-25 position by position, with ignored targets and document borders."""
    args = small_args(n_mtp_layers=depths, n_dense_layers=3, max_seq_len=12)
    model = unit_gain_model(args)
    ids = torch.randint(args.vocab_size, (1, 12))
    doc_ids = torch.tensor([[0] * 5 + [1] * 7])
    targets = ids.roll(-1, 1)
    targets[0, [4, 7, 11]] = -100  # the border, an ignored one, the end
    got = model(ids, targets=targets, doc_ids=doc_ids)[2]["loss/mtp"]

    # The main model's output, one document at a time, from a hook on its last norm.
    hidden = []
    handle = model.norm.register_forward_hook(lambda module, args, out: hidden.append(out[0]))
    for start, end in ((0, 5), (5, 12)):
        model(ids[:, start:end])
    handle.remove()

    total = 0.0
    previous = list(hidden)
    for k, module in enumerate(model.mtp, start=1):
        losses, outputs = [], []
        for number, (start, end) in enumerate(((0, 5), (5, 12))):
            n = end - start - k  # positions i with a token i + k in the same document
            rows = []
            for i in range(n):
                embedded = model.tok_embed(ids[0, start + i + k])
                joint = torch.cat((module.embed_norm(embedded), module.hidden_norm(previous[number][i])))
                rows.append(module.proj(joint))
            positions = torch.arange(n)[None]
            x = torch.stack(rows)[None]
            out = module.norm(module.block(x, TokenInfo(model.rotary(positions)))[0])[0]
            outputs.append(out)
            for i in range(n):
                target = targets[0, start + i + k]
                if target != -100:
                    losses.append(-F.log_softmax(model.lm_head(out[i]), dim=-1)[target])
        previous = outputs
        total = total + torch.stack(losses).sum() / (targets != -100).sum()  # equation 24 divides by T
    assert got.item() == pytest.approx((args.mtp_loss_weight * total / depths).item(), rel=1e-5)


@pytest.mark.parametrize("depths", [1, 2])
def test_mtp_accuracy_equals_a_count(depths):
    """Every sixteenth position of each depth, one by one; taught for a while, so that some of it is right."""
    model = unit_gain_model(small_args(n_mtp_layers=depths, max_seq_len=40)).train()
    ids = torch.arange(40).repeat(2, 1) % 5 + 3
    targets = ids.roll(-1, 1)
    targets[0, 20:] = targets[:, -1] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):
        optimizer.zero_grad()
        model(ids, targets=targets)[1].backward()
        optimizer.step()
    outputs = []
    for module in model.mtp:
        module.register_forward_hook(lambda _m, _i, out: outputs.append(out[0]))
    _, _, other_vars = model(ids, targets=targets)
    right = seen = 0
    for k, hidden in enumerate(outputs, start=1):
        for row, position in itertools.product(range(2), range(0, 40 - k, 16)):
            target = targets[row, position + k].item()
            if target != -100:
                seen += 1
                right += (model.lm_head.weight @ hidden[row, position]).argmax().item() == target
    assert 0 < right and other_vars["mtp/accuracy"].item() == pytest.approx(right / seen)


@pytest.mark.parametrize("q_lora_rank", [0, 20])
def test_absorbed_attention_equals_expanded(q_lora_rank):
    args = small_args(q_lora_rank=q_lora_rank)
    model = unit_gain_model(args)
    attn = model.layers[0].attn
    x = torch.randn(2, 9, args.dim)
    rope = model.rotary(torch.arange(9)[None])
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    calls = {}
    expanded, absorbed = attn._expanded, attn._absorbed
    attn._expanded = lambda *inputs: calls.setdefault("inputs", inputs) and expanded(*inputs)
    attn(x, TokenInfo(rope, mask))
    q_nope, q_rope, latent, k_rope, mask = calls["inputs"]
    want, seen = expanded(*calls["inputs"]), torch.cat((latent, k_rope), dim=-1)
    torch.testing.assert_close(absorbed(q_nope, q_rope, seen, mask), want, atol=1e-5, rtol=1e-4)
    for at in 0, 4, 8:  # one query alone
        one = absorbed(q_nope[:, at : at + 1], q_rope[:, at : at + 1], seen, mask[:, :, at : at + 1].expand(2, 1, 1, 9))
        torch.testing.assert_close(one[:, 0], want[:, at], atol=1e-5, rtol=1e-4)


def test_mtp_loss_of_packed_documents_is_that_of_each_alone():
    """Equations 24-25 divide by the targets of the sequence: packed, each document weighs by its own."""
    model = unit_gain_model(small_args(n_mtp_layers=2, seq_aux_alpha=0.0))
    ids = torch.randint(model.args.vocab_size, (1, 16))
    bounds = [0, 5, 6, 8, 16]  # a document of one token and one of two among them
    doc_ids, targets = torch.zeros_like(ids), ids.roll(-1, 1)
    for start, end in itertools.pairwise(bounds):
        doc_ids[:, start:end] = start
        targets[:, end - 1] = -100
    terms = model(ids, targets, doc_ids=doc_ids)[2]
    total = {"loss/ce": 0.0, "loss/mtp": 0.0}
    for start, end in itertools.pairwise(bounds):
        alone = model(ids[:, start:end], targets[:, start:end])[2]
        for key in total:
            total[key] += alone.get(key, torch.zeros(())).item() * (end - start - 1)
    for key, value in total.items():
        assert terms[key].item() == pytest.approx(value / (16 - 4), rel=1e-5), key


def test_cache_holds_the_latent_and_the_rotary_key_only():
    args = small_args()
    model = unit_gain_model(args)
    state = model.init_state(2, 10)
    model(torch.randint(args.vocab_size, (2, 4)), state=state)
    for layer in state.layers:
        size = sum(tensor.nbytes for tensor in layer.values())  # 2 sequences of 10 tokens in fp32
        assert size == 2 * 10 * (args.kv_lora_rank + args.qk_rope_head_dim) * 4


def test_default_sizes_are_the_documented_ones():
    with torch.device("meta"):
        counts = DeepSeekV3Model(DeepSeekV3ModelArgs()).num_params()
        without = DeepSeekV3Model(DeepSeekV3ModelArgs(n_mtp_layers=0)).num_params()
    assert 160e6 < without["total"] < 172e6  # "~165M parameters, ~100M active, plus MTP"
    assert 95e6 < without["active"] < 108e6
    assert counts["active"] == without["active"]
