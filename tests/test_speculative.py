"""Speculative decoding changes the number of forward passes and nothing else: the tokens are those without it."""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch

from engine.inference.chat import ChatModel
from engine.inference.generate import decode, generate, new_request, stream
from engine.inference.sampling import Sampling
from engine.inference.speculative import SpeculativeScheduler
from model import get_model_and_args
from tests.support.decoding_models import EVERY, PROMPTS, TOKENIZER, V, build
from tests.support.models import SHIPPED, TINY, sizes_of
from utils.errors import UserError

DRAFTING = [name for name in SHIPPED if build(name).draft is not None]
SETTINGS = (
    dict(temperature=0),
    dict(temperature=0.9, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3, seed=3),
)
SAMPLES = int(os.environ.get("SPECULATIVE_SAMPLES", 3000))


def pairs():
    """Every model by prompt lookup, those with a draft module by that too."""
    names = [getattr(name, "values", (name,))[0] for name in EVERY if name != "no state"]
    return [(name, "ngram") for name in names] + [(name, "draft") for name in DRAFTING]


@pytest.mark.parametrize("name, kind", pairs())
def test_the_tokens_are_those_without_speculation(name, kind):
    model = build(name)
    for settings in SETTINGS:
        for ids in (*PROMPTS, [1, 2, 3] * 5):
            plain = generate(model, TOKENIZER, [ids], 25, stop_ids=(2,), **settings)
            assert generate(model, TOKENIZER, [ids], 25, stop_ids=(2,), speculative=kind, **settings) == plain
        assert list(stream(model, TOKENIZER, ids, 25, stop_ids=(2,), speculative=kind, **settings)) == plain[0]


@pytest.mark.parametrize("name", [name for name in EVERY if name != "no state"])
def test_accepted_drafts_save_forward_passes_and_rejected_ones_leave_no_trace(name):
    """With the known answer drafted, and with a wrong token at one place of each draft."""
    model, ids = build(name), PROMPTS[0]
    answer = generate(model, TOKENIZER, [ids], 25, stop_ids=(), temperature=0)[0]

    def lookup(wrong):
        def draft(text):
            n_tokens = len(text) - len(ids)
            ahead = answer[n_tokens : n_tokens + 4]
            return [(token + 1) % V if place == wrong else token for place, token in enumerate(ahead)]

        return draft

    for wrong, forward_passes in ((None, 6), (0, 25), (1, 13), (3, 7)):
        request = new_request(TOKENIZER, ids, 25, Sampling(0), ())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("engine.inference.speculative.prompt_lookup", lookup(wrong))
            for _ in decode(model, [request], "ngram"):
                pass
        assert request.tokens == answer and request.finish == "length"
        assert request.forward_passes == forward_passes
        assert request.accepted == 25 - forward_passes and request.drafted >= request.accepted


@pytest.mark.parametrize("name", DRAFTING)
@torch.no_grad()
def test_drafts_step_by_step_are_those_of_one_pass(name):
    """As in training: at position i from its output and the embedding of token i + 1; and padding changes nothing."""
    model = build(name)
    ids = torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(0))
    state, drafts = model.init_state(2), model.init_state(2)
    model(ids, state=state)
    at_once = model.draft(state.hidden[:, :-1], ids[:, 1:], model.init_state(2))[0]
    at, parts = 0, []
    for count in (5, 1, 3, 1, 1, 8):
        parts.append(model.draft(state.hidden[:, at : at + count], ids[:, at + 1 : at + 1 + count], drafts)[0])
        drafts.advance(count)
        at += count
    assert at == 19
    torch.testing.assert_close(torch.cat(parts, dim=1), at_once, atol=2e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTING)
def test_sampled_tokens_follow_the_exact_distribution(name):
    """All answers of three tokens over a small vocabulary against their probabilities, by Pearson's chi-squared."""
    Model, ModelArgs = get_model_and_args(name)
    torch.manual_seed(5)
    model = Model(ModelArgs(vocab_size=4, max_seq_len=16, **sizes_of(name, TINY)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.25)
    answers = list(itertools.product(range(4), repeat=3))
    with torch.no_grad():
        logs = model.eval()(torch.tensor([[1, 2, *answer] for answer in answers]))[0].double().log_softmax(-1)
    expected = sum(logs[range(64), 1 + place, [answer[place] for answer in answers]] for place in range(3)).exp()
    counts, drafted, accepted = torch.zeros(64), 0, 0
    for seed in range(SAMPLES):
        request = new_request(TOKENIZER, [1, 2], 3, Sampling(seed=seed), ())
        for _ in decode(model, [request], "draft"):
            pass
        counts[answers.index(tuple(request.tokens))] += 1
        drafted, accepted = drafted + request.drafted, accepted + request.accepted
    assert expected.sum() == pytest.approx(1) and 0.05 < accepted / drafted < 0.9
    chi2 = ((counts - SAMPLES * expected) ** 2 / (SAMPLES * expected)).sum().item()
    assert chi2 < 63 + 5 * (2 * 63) ** 0.5  # five standard deviations above its mean of 63


def test_unsupported_speculation_is_one_line():
    for name, kind, message in (
        ("no state", "ngram", "takes `state`"),
        ("recurrent", "draft", "ngram"),
        ("recurrent", "mtp", "--speculative=draft"),
        ("recurrent", "magic", "choose one"),
    ):
        with pytest.raises(UserError, match=message):
            generate(build(name), TOKENIZER, [[1]], 3, speculative=kind)
    with pytest.raises(UserError, match="empty"):
        generate(build("recurrent"), TOKENIZER, [[]], 3, speculative="ngram")
    model = build("recurrent")
    model.lm_head.bias.data[3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        generate(model, TOKENIZER, [[1]], 3, speculative="ngram")


def chat_model(name, speculative=""):
    tokenizer = SimpleNamespace(
        stop_ids=(), special_ids=(), is_byte_level=True, token_bytes=lambda token: b"%d " % token
    )
    run = SimpleNamespace(model=build(name), tokenizer=tokenizer, config={"stage": "sft"})
    chat = ChatModel(run, speculative=speculative)
    chat.prompt_ids = lambda ids, max_new_tokens: (ids, 0)  # ids in place of messages
    return chat


def test_the_stats_of_a_generation_count_forward_passes_and_drafted_tokens():
    with chat_model("recurrent") as plain, chat_model("recurrent", "ngram") as speculating:
        expected, generation = (chat.generate([1, 2, 3] * 4, 20, temperature=0) for chat in (plain, speculating))
        assert "".join(expected) == "".join(generation)
        stats = generation.stats()
        assert stats["tokens"] == 20 and stats["forward_passes"] == 20 - stats["accepted"]
        assert "forward_passes" not in expected.stats()


@pytest.mark.parametrize("name, kind", pairs())
def test_the_next_turn_prefills_only_the_new_tokens(name, kind):
    """Whatever was drafted and rejected before; a draft module continues from the cached prefix as well."""
    model = build(name)
    scheduler = SpeculativeScheduler(model, kind)
    ids, new = [1, 7, 8, 9], 0
    for turn in range(3):
        sampling = Sampling(0.9, top_p=0.9, seed=turn)
        request, alone = (new_request(TOKENIZER, ids, 9, sampling, {2}) for _ in range(2))
        scheduler.add(request)
        while scheduler.busy:
            scheduler.step()
        for _ in decode(model, [alone]):
            pass
        assert request.tokens == alone.tokens and request.finish == alone.finish
        assert len(ids) - request.cached_tokens == (len(ids) if turn == 0 else new), turn
        new = len(ids) + len(request.tokens) + 2 - len(scheduler.slots[0].ids)
        ids = [*ids, *request.tokens, 2, 11 + turn]
        assert scheduler.batch.state.can_rewind() is False or new <= 3
