"""Continuous batching: whoever joins and leaves beside it, a request has the tokens that it has alone."""

import os
import random
import threading
import time
from dataclasses import replace

import pytest
import torch

from engine.inference.generate import new_request
from engine.inference.sampling import Sampling
from engine.inference.scheduler import Batch, QueueFull
from engine.inference.worker import Service
from tests.support.decoding_models import EVERY, LONGEST, TOKENIZER, V, build
from tests.support.models import SHIPPED
from tests.support.sampling_reference import probabilities
from utils.errors import UserError

MANY = int(os.environ.get("BATCHING_REQUESTS", 300))


@torch.no_grad()
def alone(model, ids, sampling, most, stops=()):
    """The definition: read the whole text again for every token, penalise, filter, and invert the distribution."""
    answer = []
    uniforms = 1 - torch.rand(min(most, LONGEST - len(ids)), generator=torch.Generator().manual_seed(sampling.seed))
    for uniform in uniforms.tolist():
        scores = model(torch.tensor([ids + answer]))[0][0, -1].tolist()
        for token in {*ids, *answer}:
            penalty = sampling.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        scores = [score - sampling.frequency_penalty * answer.count(token) for token, score in enumerate(scores)]
        likeliest_first = sorted(range(V), key=lambda token: -scores[token])
        if sampling.temperature == 0:
            token = likeliest_first[0]
        else:
            probs = probabilities(scores, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            few = 0 < sampling.top_k < V or sampling.top_p < 1  # then the order of the draw is by likelihood
            reached, order = 0.0, likeliest_first if few else range(V)
            for token in order:
                reached += probs[token]
                if reached >= uniform:
                    break
        if token in stops:
            break
        answer.append(token)
    return answer


def some_request(rng, longest=24):
    ids = [rng.randrange(V) for _ in range(rng.choice((1, 2, 5, 9, 9, 20, 30)))]
    sampling = Sampling(
        rng.choice((0.0, 0.7, 1.0)),
        rng.choice((0, 0, 8)),
        rng.choice((1.0, 0.9)),
        rng.choice((0.0, 0.05)),
        rng.choice((1.0, 1.2)),
        rng.choice((0.0, 0.5)),
        seed=rng.randrange(2**40),
    )
    return new_request(TOKENIZER, ids, rng.randint(1, longest), sampling, {TOKENIZER.eos_id}), sampling


@pytest.mark.parametrize("name", EVERY)
def test_64_requests_have_the_tokens_they_have_alone(name):
    model, rng = build(name), random.Random(7)
    pairs = [some_request(rng) for _ in range(64)]
    batch, coming, together = Batch(model, slots=7), list(pairs), 0
    while coming or batch.busy:
        for _ in range(min(rng.choice((0, 0, 1, 2, 9)), len(coming))):  # they join at any step
            batch.add(coming.pop(0)[0])
        batch.step()
        together = max(together, len(batch.running))
    assert together == 7 and len({len(request.tokens) for request, _ in pairs}) > 8
    for number, (request, sampling) in enumerate(pairs):
        assert request.tokens == alone(model, request.ids, sampling, request.max_new_tokens, request.stop_ids), number
        assert request.finish == ("length" if len(request.tokens) == request.limit else "stop")


@pytest.mark.parametrize("name", EVERY)
def test_the_next_turn_reads_only_what_is_new(name):
    """And has the tokens of a prompt that is read from its start: also when other conversations go on beside it."""
    model, rng, batch = build(name), random.Random(1), Batch(build(name), slots=3)
    talks = [[rng.randrange(V) for _ in range(4)] for _ in range(3)]
    for turn in range(3):
        requests = [new_request(TOKENIZER, ids, 6, Sampling(0.8, seed=turn), ()) for ids in talks]
        batch.add(*requests)
        while batch.busy:
            batch.step()
        for ids, request in zip(talks, requests):
            assert request.tokens == alone(model, ids, Sampling(0.8, seed=turn), 6)
        talks = [[*ids, *request.tokens, 1 + number] for number, (ids, request) in enumerate(zip(talks, requests))]
    # The last token of an answer was never read: a second turn reads it and the one token that follows.
    assert batch.read == 3 * 4 + 2 * 3 * 2 and batch.reused == 3 * (9 + 16)
    read = batch.read
    batch.add(new_request(TOKENIZER, talks[0][:8], 1, Sampling(0), ()))  # a memory that goes on: of no use
    batch.step()
    assert batch.read == read + 8


def bytes_held(batch):
    return sum(tensor.nbytes for layer in batch.rows.state.layers for tensor in layer.values())


@pytest.mark.parametrize("name", [*SHIPPED, pytest.param("Hybrid", marks=pytest.mark.slow)])
def test_memory_is_flat_over_many_requests(name):
    """The state keeps its bytes, caches the very tensors; nothing but what was asked and answered is kept."""
    rng, batch = random.Random(2), Batch(build(name), slots=8)
    places, held, done = None, None, 0
    while done < MANY:
        while len(batch.waiting) < 4:
            batch.add(some_request(rng, 6)[0])
        done += sum(request.finish is not None for request in batch.step())
        if done > 30:
            now = [layer[key].data_ptr() for layer in batch.rows.state.layers for key in layer]
            places, held = places or now, held or bytes_held(batch)
            assert bytes_held(batch) == held
            assert now == places or name == "Hybrid"  # a recurrent layer puts a new matrix where the old one was
    assert sum(len(memory.ids) for memory in batch.memories) <= 8 * LONGEST and len(batch.waiting) <= 4


def test_first_come_first_served_and_a_token_a_step_for_everybody():
    batch = Batch(build("recurrent"), slots=2)
    long = new_request(TOKENIZER, [1], 40, Sampling(0), ())
    short = [new_request(TOKENIZER, [1, 2 + i], 3, Sampling(0), ()) for i in range(6)]
    batch.add(long, *short)
    order = []
    while batch.busy:
        before = [len(request.tokens) for request in (long, *short)]
        running = [*batch.running]
        moved = batch.step()
        assert all(request in moved for request in running)
        assert all(len(request.tokens) - n <= 1 for request, n in zip((long, *short), before))
        order += [request for request in moved if request.finish]
    assert order == [*short, long] and batch.steps == 40  # nobody waited for the long one, nor it for them


def test_prompts_that_wait_do_not_hold_up_those_who_write(monkeypatch):
    monkeypatch.setattr("engine.inference.scheduler.READ_TOKENS", 30)
    batch = Batch(build("recurrent"), slots=8)
    batch.add(*(new_request(TOKENIZER, [1] * 20, 9, Sampling(0), ()) for _ in range(6)))
    read = []
    while batch.busy:
        before = batch.read
        batch.step()
        read.append(batch.read - before)
    assert read[:4] == [40, 40, 40, 0] and sum(read) == 120


def test_cancelled_and_overdue_requests_make_room_at_once():
    model = build("recurrent")
    batch = Batch(model, slots=2, queue=3)
    first, second, third, late = (new_request(TOKENIZER, [1, 2 + i], 30, Sampling(0), ()) for i in range(4))
    batch.add(first, second)
    batch.step()
    batch.add(third, late)
    late.deadline = time.monotonic() - 1
    assert batch.step() == [late, first, second] and late.finish == "deadline" and late.tokens == []
    first.cancelled = True
    batch.step()
    assert first.finish == "cancelled" and len(first.tokens) == 2 and batch.running == [second, third]
    third.cancelled = True
    while batch.busy:
        batch.step()
    assert second.tokens == alone(model, second.ids, Sampling(0, seed=0), 30)


def test_the_queue_is_bounded_and_takes_all_or_none():
    batch = Batch(build("recurrent"), slots=1, queue=3)

    def ask(count):
        batch.add(*(new_request(TOKENIZER, [1], 5, Sampling(0), ()) for _ in range(count)))

    ask(2)
    with pytest.raises(QueueFull):
        ask(2)
    ask(1)
    with pytest.raises(UserError, match="empty"):
        batch.add(new_request(TOKENIZER, [1], 5, Sampling(0), ()), new_request(TOKENIZER, [], 5, Sampling(0), ()))
    assert len(batch.waiting) == 3


def test_a_row_that_fails_leaves_the_others_alone():
    model = build("recurrent")
    model.tok_embed.weight.data[9] = float("nan")  # who reads a 9 has no numbers any more
    batch, sampling = Batch(model, slots=2), Sampling(0.9, top_k=5, seed=4)
    good, bad, next_one = (new_request(TOKENIZER, ids, 8, sampling, ()) for ids in ([1, 3], [1, 9], [1, 4]))
    model.lm_head.bias.data[9] = -1e9
    batch.add(good, bad, next_one)
    while batch.busy:
        batch.step()
    assert bad.finish == "error" and "not finite" in bad.error and bad.tokens == []
    assert good.tokens == alone(model, [1, 3], sampling, 8) and next_one.tokens == alone(model, [1, 4], sampling, 8)


def test_the_service_answers_many_threads_at_once():
    model, rng = build("recurrent"), random.Random(3)
    pairs = [some_request(rng) for _ in range(40)]
    with Service(model, slots=5, queue=100) as service:

        def ask(request):
            done = threading.Event()
            request.notify = lambda: request.finish and done.set()
            service.submit(request)
            assert done.wait(60)

        threads = [threading.Thread(target=ask, args=(request,)) for request, _ in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for request, sampling in pairs:
        assert request.tokens == alone(model, request.ids, sampling, request.max_new_tokens, request.stop_ids)


def test_the_service_survives_a_model_that_fails(capsys):
    model = build("recurrent")
    forward, ended = model.forward, threading.Semaphore(0)

    def failing(ids, targets=None, state=None):
        if (ids == 9).any():
            raise RuntimeError("out of memory")
        return forward(ids, state=state)

    model.forward = failing

    def ask(ids):
        request = new_request(TOKENIZER, ids, 5, Sampling(0), (), notify=lambda: request.finish and ended.release())
        service.submit(request)
        assert ended.acquire(timeout=60)
        return request

    with Service(model, slots=2, queue=10) as service:
        model.lm_head.bias.data[9] = -1e9
        failed = ask([1, 9])
        assert failed.finish == "error" and "out of memory" not in failed.error
        assert len(ask([1, 4]).tokens) == 5
        left = new_request(TOKENIZER, [1], 40, Sampling(0), ())
        service.submit(left)
    assert left.finish is not None  # nobody waits for a service that has closed
    assert "out of memory" in capsys.readouterr().err


def test_sampling_streams_of_a_batch_of_rows():
    assert [Sampling(seed=5).of_row(row) for row in (0, 3)] == [Sampling(seed=5), replace(Sampling(), seed=8)]
    assert Sampling().of_row(3).seed is None
