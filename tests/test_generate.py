"""Decoding through the state, by recomputation, alone and in a batch; sampling filters against plain formulas."""
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from engine.generate import generate, stream
from engine.sampling import Sampling, distribution, penalize, pick
from model import BaseModel, BaseModelArgs, get_model_and_args, list_models
from utils.errors import UserError

V, LONGEST = 61, 48
TOKENIZER = SimpleNamespace(eos_id=2, im_end_id=5)
TINY = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "inter_dim": 48, "moe_inter_dim": 16,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 4, "n_activated_experts": 2}


class NoState(BaseModel):
    """A plugin with the required forward and nothing else: a causal mean of embeddings, and positions."""

    def __init__(self, args):
        super().__init__(args)
        self.tok_embed = torch.nn.Embedding(args.vocab_size, 16)
        self.position = torch.nn.Embedding(args.max_seq_len, 16)
        self.lm_head = torch.nn.Linear(16, args.vocab_size)

    def forward(self, input_ids, targets=None):
        x = self.tok_embed(input_ids) + self.position.weight[:input_ids.shape[1]]
        count = torch.arange(1, x.shape[1] + 1)[:, None]
        return self.lm_head(torch.tanh(x + 3 * x.cumsum(1) / count)), None, {}


class Remembers(NoState):
    """The same with a recurrent state: a running sum. One token too many in it would show in every later one."""

    def init_state(self, batch_size, max_len=None):
        state = super().init_state(batch_size, max_len)
        state.layers = [{"sum": torch.zeros(batch_size, 1, 16)}]
        return state

    def forward(self, input_ids, targets=None, state=None):
        if state is None:
            return super().forward(input_ids, targets)
        at = state.positions(input_ids.shape[1])                                                       # (B, T)
        x = self.tok_embed(input_ids) + self.position.weight[at]
        sums = x.cumsum(1) + state.layers[0]["sum"]
        state.layers[0]["sum"] = sums[:, -1:]
        return self.lm_head(torch.tanh(x + 3 * sums / (at + 1)[..., None])), None, {}


def make(name):
    torch.manual_seed(3)
    if name in ("no state", "recurrent"):
        return {"no state": NoState, "recurrent": Remembers}[name](BaseModelArgs(V, LONGEST)).eval()
    Model, ModelArgs = get_model_and_args(name)
    known = {field.name for field in dataclasses.fields(ModelArgs)}
    model = Model(ModelArgs(vocab_size=V, max_seq_len=LONGEST, **{k: v for k, v in TINY.items() if k in known}))
    with torch.no_grad():       # far from uniform, so that the likeliest token is no matter of rounding
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return model.eval()


EVERY = [*list_models(), "no state", "recurrent"]
PROMPTS = [[1, 7, 8, 9], [1, 20], [1, 33, 34, 35, 36, 37, 38, 39, 40], [1, 50, 51, 52], [4] * 30]


def reread(model, ids, max_new_tokens, stop_ids=()):
    """What greedy decoding must give: the likeliest next token of the whole text, again and again."""
    ids, start = list(ids), len(ids)
    while len(ids) < min(start + max_new_tokens, LONGEST):
        with torch.no_grad():
            token = model(torch.tensor([ids]))[0][0, -1].argmax().item()
        if token in stop_ids:
            break
        ids.append(token)
    return ids[start:]


@pytest.mark.parametrize("name", EVERY)
def test_greedy_equals_rereading_alone_and_in_a_batch(name):
    model = make(name)
    expected = [reread(model, ids, 25) for ids in PROMPTS]
    assert len({token for answer in expected for token in answer}) > 8          # not one token over and over
    assert generate(model, TOKENIZER, PROMPTS, 25, stop_ids=(), temperature=0) == expected
    for ids, answer in zip(PROMPTS, expected):
        assert list(stream(model, TOKENIZER, ids, 25, stop_ids=(), temperature=0)) == answer
    assert [len(answer) for answer in expected] == [25, 25, 25, 25, 18]         # the last one fills max_seq_len


@pytest.mark.parametrize("name", EVERY)
def test_rows_leave_the_batch_at_their_stop_token(name):
    model = make(name)
    plain = [reread(model, ids, 25) for ids in PROMPTS]
    stops = {plain[0][3], plain[2][9], plain[4][0]}
    expected = [reread(model, ids, 25, stops) for ids in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1
    assert generate(model, TOKENIZER, PROMPTS, 25, stop_ids=stops, temperature=0) == expected


@pytest.mark.parametrize("name", EVERY)
def test_sampling_is_the_same_alone_in_a_batch_and_again(name):
    model, sampling = make(name), dict(temperature=0.9, top_p=0.95, repetition_penalty=1.1, stop_ids=(2,))
    together = generate(model, TOKENIZER, PROMPTS, 12, seed=5, **sampling)
    assert together == generate(model, TOKENIZER, PROMPTS, 12, seed=5, **sampling)
    assert together != generate(model, TOKENIZER, PROMPTS, 12, seed=6, **sampling)
    for row, ids in enumerate(PROMPTS):
        assert generate(model, TOKENIZER, [ids], 12, seed=5 + row, **sampling) == [together[row]]
        assert list(stream(model, TOKENIZER, ids, 7, seed=5 + row, **sampling)) == together[row][:7]
    fresh = [generate(model, TOKENIZER, PROMPTS, 12, **sampling) for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_training_mode_and_the_stop_tokens_of_the_tokenizer():
    model = make("recurrent").train()
    model.lm_head.bias.data[TOKENIZER.im_end_id] = 1e4
    assert generate(model, TOKENIZER, [[1], [1, 2]], 5) == [[], []]
    assert model.training
    running = stream(model, TOKENIZER, [1], 5, stop_ids=())
    next(running)
    running.close()                                 # a reader who walks away leaves the model as it was
    assert model.training and generate(model, TOKENIZER, [], 5) == []


def probabilities(logits, temperature, top_k, top_p, min_p):
    """The definitions, one token at a time, in Python's own float64."""
    scores = [value / temperature for value in logits]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = order[:top_k] if top_k else order
    weights = {i: math.exp(scores[i] - scores[order[0]]) for i in kept}
    total, kept, mass = sum(weights.values()), [], 0.0
    for i in order[:len(weights)]:
        if mass >= top_p and top_p < 1:
            break
        kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(scores))]


@pytest.mark.parametrize("temperature", (0.3, 1.0, 1.7))
@pytest.mark.parametrize("top_k", (0, 1, 7, 1000))
@pytest.mark.parametrize("top_p", (0.05, 0.6, 1.0))
@pytest.mark.parametrize("min_p", (0.0, 0.1, 1.0))
def test_filters_against_the_definitions(temperature, top_k, top_p, min_p):
    logits = torch.randn(4, 37, generator=torch.Generator().manual_seed(0)) * 3
    sampling = Sampling(temperature, top_k, top_p, min_p)
    expected = torch.tensor([probabilities(row.double().tolist(), temperature, top_k, top_p, min_p) for row in logits])
    torch.testing.assert_close(distribution(logits, sampling), expected.float(), atol=1e-6, rtol=1e-5)


def test_top_p_over_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3000, generator=generator) * torch.tensor([[0.1], [5.0], [1.5]])   # flat, sharp, between
    expected = torch.tensor([probabilities(row.double().tolist(), 1.0, 0, 0.9, 0.0) for row in logits])
    assert (expected[0] > 0).sum() > 1024 > (expected[1] > 0).sum()              # by a full sort, and by the few
    assert torch.equal((distribution(logits, Sampling(top_p=0.9)) > 0).sum(-1), (expected > 0).sum(-1))
    torch.testing.assert_close(distribution(logits, Sampling(top_p=0.9)), expected.float(), atol=1e-7, rtol=1e-4)
    for u in (1e-6, 0.5, 1.0):
        drawn = pick(logits, Sampling(top_p=0.9), torch.full((3,), u))
        alone = [pick(row[None], Sampling(top_p=0.9), torch.tensor([u])) for row in logits]
        assert torch.equal(drawn, torch.cat(alone)) and (expected[range(3), drawn] > 0).all()


def test_drawn_tokens_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -9.0]])
    for sampling in (Sampling(), Sampling(1e-300), Sampling(2.0), Sampling(top_p=0.8), Sampling(top_k=3, min_p=0.2)):
        drawn = pick(logits.expand(40_000, -1), sampling, Sampling(seed=1).uniforms(1, 40_000)[0])
        share = torch.bincount(drawn, minlength=6) / len(drawn)
        expected = distribution(logits, sampling)[0]
        assert (share - expected).abs().max() < 0.012           # five standard deviations
        assert share[expected == 0].sum() == 0
        for edge in (1.0, 2**-24, 1 - 2**-24):                  # the ends of the interval draw no filtered token
            assert expected[pick(logits, sampling, torch.tensor([edge]))] > 0


def test_repetition_penalty_and_greedy():
    logits, seen = torch.tensor([[2.0, -2.0, 1.9, -1.0]]), torch.tensor([[True, True, False, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, torch.tensor(1.9).item(), -1.0]]
    model = make("no state")
    model.lm_head.bias.data[9] = 100.0              # would be said for ever
    assert generate(model, TOKENIZER, [[1]], 6, stop_ids=(), temperature=0) == [[9] * 6]
    once = generate(model, TOKENIZER, [[1]], 6, stop_ids=(), temperature=0, repetition_penalty=1e4)[0]
    assert once.count(9) == 1 and len(set(once)) == 6
    assert 9 not in generate(model, TOKENIZER, [[1, 9]], 6, stop_ids=(), temperature=0, repetition_penalty=1e4)[0]


@pytest.mark.parametrize("bad", ({"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1},
                                 {"min_p": 2}, {"top_k": -1}, {"repetition_penalty": 0}, {"seed": -1}, {"seed": 2**63}))
def test_settings_out_of_range(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.mark.parametrize("ids, new, message", (([], 5, "empty"), ([V], 5, "vocabulary"), ([-1], 5, "vocabulary"),
                                               ([1] * LONGEST, 5, f"{LONGEST} tokens"), ([1], 0, "max_new_tokens")))
def test_prompts_that_cannot_be_answered(ids, new, message):
    with pytest.raises(UserError, match=message) as caught:
        generate(make("no state"), TOKENIZER, [[1], ids], new)
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite_stop_with_a_reason():
    model = make("no state")
    model.lm_head.bias.data[3] = float("nan")
    for temperature in (0, 1):
        with pytest.raises(UserError, match="not finite"):
            generate(model, TOKENIZER, [[1], [1, 2]], 3, temperature=temperature)
