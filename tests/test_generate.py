"""Decoding with a state and by recomputation, alone and in a batch; sampling filters against their formulas."""

import pytest
import torch

from engine.inference.generate import decode, generate, new_request, stream
from engine.inference.sampling import Sampling, distribution, log_probabilities, penalize, sample
from tests.support.decoding_models import LONGEST, PROMPTS, TOKENIZER, V, build
from tests.support.models import SHIPPED
from tests.support.sampling_reference import probabilities
from utils.errors import UserError

MODELS = [*SHIPPED, "no state", "recurrent"]


def greedy_alone(model, ids, max_new_tokens, stop_ids=()):
    """Greedy decoding by its definition: the likeliest next token after all tokens so far."""
    ids, start = list(ids), len(ids)
    while len(ids) < min(start + max_new_tokens, LONGEST):
        with torch.no_grad():
            token = model(torch.tensor([ids]))[0][0, -1].argmax().item()
        if token in stop_ids:
            break
        ids.append(token)
    return ids[start:]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_recomputation_alone_and_in_a_batch(name):
    model = build(name)
    expected = [greedy_alone(model, ids, 25) for ids in PROMPTS]
    assert len({token for answer in expected for token in answer}) > 8  # not one token over and over
    assert generate(model, TOKENIZER, PROMPTS, 25, stop_ids=(), temperature=0) == expected
    for ids, answer in zip(PROMPTS, expected):
        assert list(stream(model, TOKENIZER, ids, 25, stop_ids=(), temperature=0)) == answer
    assert [len(answer) for answer in expected] == [25, 25, 25, 25, 18]  # the last one fills max_seq_len


@pytest.mark.parametrize("name", MODELS)
def test_sequences_end_at_their_stop_token(name):
    model = build(name)
    plain = [greedy_alone(model, ids, 25) for ids in PROMPTS]
    stops = {plain[0][3], plain[2][9], plain[4][0]}
    expected = [greedy_alone(model, ids, 25, stops) for ids in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1
    assert generate(model, TOKENIZER, PROMPTS, 25, stop_ids=stops, temperature=0) == expected


@pytest.mark.parametrize("name", MODELS)
def test_sampling_is_the_same_alone_in_a_batch_and_again(name):
    model, sampling = build(name), dict(temperature=0.9, top_p=0.95, repetition_penalty=1.1, stop_ids=(2,))
    together = generate(model, TOKENIZER, PROMPTS, 12, seed=5, **sampling)
    assert together == generate(model, TOKENIZER, PROMPTS, 12, seed=5, **sampling)
    assert together != generate(model, TOKENIZER, PROMPTS, 12, seed=6, **sampling)
    for index, ids in enumerate(PROMPTS):
        assert generate(model, TOKENIZER, [ids], 12, seed=5 + index, **sampling) == [together[index]]
        assert list(stream(model, TOKENIZER, ids, 7, seed=5 + index, **sampling)) == together[index][:7]
    fresh = [generate(model, TOKENIZER, PROMPTS, 12, **sampling) for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_training_mode_and_the_stop_tokens_of_the_tokenizer():
    model = build("recurrent").train()
    model.lm_head.bias.data[TOKENIZER.im_end_id] = 1e4
    assert generate(model, TOKENIZER, [[1], [1, 2]], 5) == [[], []]
    assert model.training
    running = stream(model, TOKENIZER, [1], 5, stop_ids=())
    next(running)
    running.close()  # a generator that is not exhausted restores the mode too
    assert model.training and generate(model, TOKENIZER, [], 5) == []


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
    logits = torch.randn(3, 3000, generator=generator) * torch.tensor([[0.1], [5.0], [1.5]])  # flat, sharp, between
    expected = torch.tensor([probabilities(row.double().tolist(), 1.0, 0, 0.9, 0.0) for row in logits])
    assert (expected[0] > 0).sum() > 1024 > (expected[1] > 0).sum()  # by a full sort, and by the 1024 likeliest
    assert torch.equal((distribution(logits, Sampling(top_p=0.9)) > 0).sum(-1), (expected > 0).sum(-1))
    torch.testing.assert_close(distribution(logits, Sampling(top_p=0.9)), expected.float(), atol=1e-7, rtol=1e-4)
    for u in (1e-6, 0.5, 1.0):
        drawn = sample(logits, Sampling(top_p=0.9), torch.full((3,), u))
        alone = [sample(row[None], Sampling(top_p=0.9), torch.tensor([u])) for row in logits]
        assert torch.equal(drawn, torch.cat(alone)) and (expected[range(3), drawn] > 0).all()


def test_drawn_tokens_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -9.0]])
    for sampling in (Sampling(), Sampling(1e-300), Sampling(2.0), Sampling(top_p=0.8), Sampling(top_k=3, min_p=0.2)):
        drawn = sample(logits.expand(40_000, -1), sampling, Sampling(seed=1).uniforms(40_000))
        share = torch.bincount(drawn, minlength=6) / len(drawn)
        expected = distribution(logits, sampling)[0]
        assert (share - expected).abs().max() < 0.012  # five standard deviations
        assert share[expected == 0].sum() == 0
        for edge in (1.0, 2**-24, 1 - 2**-24):  # the ends of the interval draw no filtered token
            assert expected[sample(logits, sampling, torch.tensor([edge]))] > 0


def test_filters_against_transformers():
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
    from transformers import MinPLogitsWarper as MinP
    from transformers import TemperatureLogitsWarper as Temperature
    from transformers import TopKLogitsWarper as TopK
    from transformers import TopPLogitsWarper as TopP

    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 53, generator=generator) * 3
    ids = torch.randint(0, 53, (6, 20), generator=generator)  # prompt and answer
    for temperature, top_k, top_p, min_p, repetition in (
        (0.7, 0, 0.9, 0.0, 1.3),
        (1.5, 12, 0.8, 0.05, 1.0),
        (1.0, 5, 1.0, 0.2, 0.8),
        (2.0, 0, 0.5, 0.01, 2.0),
    ):
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition)
        theirs = [RepetitionPenaltyLogitsProcessor(repetition), Temperature(temperature)]
        theirs += [
            Filter(value)
            for Filter, value, off in ((TopK, top_k, 0), (TopP, top_p, 1), (MinP, min_p, 0))
            if value != off
        ]
        expected = LogitsProcessorList(theirs)(ids, logits).softmax(-1)
        seen = torch.zeros(6, 53, dtype=torch.bool).scatter(1, ids, True)
        ours = torch.stack([penalize(row, sampling, there, torch.zeros(53)) for row, there in zip(logits, seen)])
        torch.testing.assert_close(distribution(ours, sampling), expected, atol=1e-6, rtol=1e-5)


def test_frequency_and_presence_penalty_against_the_definition():
    """logit - count * frequency - (count > 0) * presence, over the answer; and the decoding loop with it."""
    logits = torch.randn(9, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([0, 1, 3, 0, 2, 0, 0, 5, 1])
    ours = penalize(logits, Sampling(frequency_penalty=0.7, presence_penalty=-0.4), counts > 0, counts)
    expected = [x - 0.7 * n + 0.4 * (n > 0) for x, n in zip(logits.double().tolist(), counts.tolist())]
    torch.testing.assert_close(ours.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)

    model, answer = build("no state"), []
    model.lm_head.bias.data[9] += 30.0  # would repeat for ever
    for _ in range(30):
        with torch.no_grad():
            scores = model(torch.tensor([[1, 9, 9] + answer]))[0][0, -1].tolist()
        scores = [x - 1.3 * answer.count(i) - 0.2 * (i in answer) for i, x in enumerate(scores)]
        answer.append(max(range(V), key=scores.__getitem__))
    assert 1 < answer.count(9) < 30 and len(set(answer)) > 3
    assert generate(
        model, TOKENIZER, [[1, 9, 9]], 30, stop_ids=(), temperature=0, frequency_penalty=1.3, presence_penalty=0.2
    ) == [answer]


def test_repetition_penalty_and_greedy():
    logits, seen = torch.tensor([2.0, -2.0, 1.9, -1.0]), torch.tensor([True, True, False, False])
    assert penalize(logits, Sampling(repetition_penalty=2.0), seen, torch.zeros(4)).tolist() == [
        1.0,
        -4.0,
        torch.tensor(1.9).item(),
        -1.0,
    ]
    model = build("no state")
    model.lm_head.bias.data[9] = 100.0  # would repeat for ever
    assert generate(model, TOKENIZER, [[1]], 6, stop_ids=(), temperature=0) == [[9] * 6]
    once = generate(model, TOKENIZER, [[1]], 6, stop_ids=(), temperature=0, repetition_penalty=1e4)[0]
    assert once.count(9) == 1 and len(set(once)) == 6
    assert 9 not in generate(model, TOKENIZER, [[1, 9]], 6, stop_ids=(), temperature=0, repetition_penalty=1e4)[0]


def test_settings_differ_within_a_batch():
    """Each sequence is sampled by its own settings, as it is alone."""
    model = build("recurrent")
    settings = [
        Sampling(0),
        Sampling(0.8, seed=1),
        Sampling(1.2, top_k=4, seed=1),
        Sampling(0, repetition_penalty=1.5),
        Sampling(0.8, seed=2),
    ]
    together = [new_request(TOKENIZER, ids, 15, one, ()) for ids, one in zip(PROMPTS, settings)]
    list(decode(model, together))
    for request, ids, one in zip(together, PROMPTS, settings):
        assert generate(model, TOKENIZER, [ids], 15, stop_ids=(), **vars(one)) == [request.tokens]


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_the_model_s_own(name):
    """Of one forward pass over all tokens, before temperature, penalties and filters."""
    model, sampling = build(name), Sampling(0.8, top_k=9, repetition_penalty=1.2, seed=3)
    requests = [
        new_request(TOKENIZER, ids, 10, sampling, (), top_logprobs=n) for ids, n in zip(PROMPTS, (3, 0, None, 5))
    ]
    list(decode(model, requests))
    assert requests[2].logprobs == []
    for request in (requests[0], requests[1], requests[3]):
        with torch.no_grad():
            logs = model(torch.tensor([request.ids + request.tokens]))[0][0].double().log_softmax(-1)
        logs = logs[len(request.ids) - 1 : -1]
        assert len(request.logprobs) == len(request.tokens) == 10
        for token, row, (own, top) in zip(request.tokens, logs, request.logprobs):
            assert own == pytest.approx(row[token].item(), abs=2e-5)
            best, ids = row.topk(request.top_logprobs)
            assert list(top) == ids.tolist() and list(top.values()) == pytest.approx(best.tolist(), abs=2e-5)
    own, top, ids = log_probabilities(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0]), 9)
    assert own.shape == (1,) and ids.tolist() == [[2, 1, 0]]  # no more than there are


@pytest.mark.parametrize(
    "bad",
    (
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 2**63},
    ),
)
def test_settings_out_of_range(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.mark.parametrize(
    "ids, new, message",
    (
        ([], 5, "empty"),
        ([V], 5, "vocabulary"),
        ([-1], 5, "vocabulary"),
        ([1] * LONGEST, 5, f"{LONGEST} tokens"),
        ([1], 0, "max_new_tokens"),
    ),
)
def test_prompts_that_cannot_be_answered(ids, new, message):
    with pytest.raises(UserError, match=message) as caught:
        generate(build("no state"), TOKENIZER, [[1], ids], new)
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite_stop_with_a_reason():
    model = build("no state")
    model.lm_head.bias.data[3] = float("nan")
    for temperature in (0, 1):
        with pytest.raises(UserError, match="not finite"):
            generate(model, TOKENIZER, [[1], [1, 2]], 3, temperature=temperature)
