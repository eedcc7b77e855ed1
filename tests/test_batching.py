"""Continuous batching: whatever else is admitted and retired, a request gets the tokens that it gets alone."""

import contextlib
import os
import random
import threading
import time
from dataclasses import replace

import pytest

from engine.inference import batch
from engine.inference import scheduler as scheduler_module
from engine.inference.generate import new_request
from engine.inference.sampling import Sampling
from engine.inference.scheduler import QueueFull, Scheduler
from engine.inference.worker import BatchWorker
from tests.support.decoding_models import EVERY, LONGEST, TOKENIZER, V, build
from tests.support.models import SHIPPED
from tests.support.sampling_reference import generate_alone
from utils.errors import UserError

MANY = int(os.environ.get("BATCHING_REQUESTS", 300))


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


QUICK = {"mini_deepseekv3", "mini_lfm3", "Recurrent"}  # all keys, windows, a matrix
SLOW = [name for name in EVERY if isinstance(name, str) and name not in QUICK]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in EVERY])
def test_64_requests_have_the_tokens_they_have_alone(name):
    model, rng = build(name), random.Random(7)
    pairs = [some_request(rng) for _ in range(64)]
    scheduler, coming, together = Scheduler(model, n_slots=7), list(pairs), 0
    while coming or scheduler.busy:
        for _ in range(min(rng.choice((0, 0, 1, 2, 9)), len(coming))):  # they join at any step
            scheduler.add(coming.pop(0)[0])
        scheduler.step()
        together = max(together, len(scheduler.running))
    assert together == 7 and len({len(request.tokens) for request, _ in pairs}) > 8
    for number, (request, sampling) in enumerate(pairs):
        assert request.tokens == generate_alone(
            model, request.ids, sampling, request.max_new_tokens, request.stop_ids
        ), number
        assert request.finish == ("length" if len(request.tokens) == request.limit else "stop")


@pytest.mark.parametrize("name", EVERY)
def test_the_next_turn_prefills_only_the_new_tokens(name):
    """And gets the tokens of a full prefill, also with other conversations running."""
    model, rng, scheduler = build(name), random.Random(1), Scheduler(build(name), n_slots=3)
    chats = [[rng.randrange(V) for _ in range(4)] for _ in range(3)]
    for turn in range(3):
        requests = [new_request(TOKENIZER, ids, 6, Sampling(0.8, seed=turn), ()) for ids in chats]
        scheduler.add(*requests)
        while scheduler.busy:
            scheduler.step()
        for ids, request in zip(chats, requests):
            assert request.tokens == generate_alone(model, ids, Sampling(0.8, seed=turn), 6)
        chats = [[*ids, *request.tokens, 1 + number] for number, (ids, request) in enumerate(zip(chats, requests))]
    # The last token of an answer was never read: the next turn prefills it and the one token after it.
    assert scheduler.prefilled_tokens == 3 * 4 + 2 * 3 * 2 and scheduler.cached_tokens == 3 * (9 + 16)
    read = scheduler.prefilled_tokens
    scheduler.add(
        new_request(TOKENIZER, chats[0][:8], 1, Sampling(0), ())
    )  # a cached sequence that goes on beyond the prompt is not reused
    scheduler.step()
    assert scheduler.prefilled_tokens == read + 8


@pytest.mark.parametrize("name", EVERY)
def test_a_single_slot_grows_with_the_text(name, monkeypatch):
    """It begins short, whatever max_seq_len is; a turn that does not fit is prefilled again in a longer slot."""
    monkeypatch.setattr(batch, "FIRST_LENGTH", 12)
    monkeypatch.setattr(scheduler_module, "MARGIN", 1)
    model, scheduler = build(name), Scheduler(build(name), n_slots=1)
    ids, lengths, cached = [3, 4, 5, 6], [], []
    for turn in range(4):
        request = new_request(TOKENIZER, ids, 6, Sampling(0.8, seed=turn), ())
        scheduler.add(request)
        while scheduler.busy:
            scheduler.step()
        assert request.tokens == generate_alone(model, ids, Sampling(0.8, seed=turn), 6)
        cached.append(request.cached_tokens)
        if model.accepts("state"):
            lengths.append(scheduler.batch.state.max_len)
        ids = [*ids, *request.tokens, 1]
    if model.accepts("state"):
        assert lengths == [12, 24, 48, 48] and [tokens > 0 for tokens in cached] == [False, False, False, True]


def state_bytes(scheduler):
    return sum(tensor.nbytes for layer in scheduler.batch.state.layers for tensor in layer.values())


@pytest.mark.parametrize("name", [*SHIPPED, pytest.param("Hybrid", marks=pytest.mark.slow)])
def test_memory_is_flat_over_many_requests(name):
    """The state keeps its size, caches keep their tensors, and a slot keeps no more than its tokens."""
    rng, scheduler = random.Random(2), Scheduler(build(name), n_slots=8)
    places, size, done = None, None, 0
    while done < MANY:
        while len(scheduler.waiting) < 4:
            scheduler.add(some_request(rng, 6)[0])
        done += sum(request.finish is not None for request in scheduler.step())
        if done > 30:
            caches = scheduler.batch.state.rewindable  # a recurrent layer replaces its matrix
            now = [layer[key].data_ptr() for layer in scheduler.batch.state.layers for key in layer if key in caches]
            places, size = places or now, size or state_bytes(scheduler)
            assert state_bytes(scheduler) == size
            assert now == places
    assert sum(len(slot.ids) for slot in scheduler.slots) <= 8 * LONGEST and len(scheduler.waiting) <= 4


def test_first_come_first_served_and_a_token_per_step_for_every_request():
    scheduler = Scheduler(build("recurrent"), n_slots=2)
    long = new_request(TOKENIZER, [1], 40, Sampling(0), ())
    short = [new_request(TOKENIZER, [1, 2 + i], 3, Sampling(0), ()) for i in range(6)]
    scheduler.add(long, *short)
    order = []
    while scheduler.busy:
        before = [len(request.tokens) for request in (long, *short)]
        running = [*scheduler.running]
        moved = scheduler.step()
        assert all(request in moved for request in running)
        assert all(len(request.tokens) - n <= 1 for request, n in zip((long, *short), before))
        order += [request for request in moved if request.finish]
    assert order == [*short, long] and scheduler.steps == 40  # none waited for the long one, nor it for them


def test_long_prefills_do_not_block_running_requests(monkeypatch):
    monkeypatch.setattr("engine.inference.scheduler.PREFILL_TOKENS", 30)
    scheduler = Scheduler(build("recurrent"), n_slots=8)
    scheduler.add(*(new_request(TOKENIZER, [1] * 20, 9, Sampling(0), ()) for _ in range(6)))
    read = []
    while scheduler.busy:
        before = scheduler.prefilled_tokens
        scheduler.step()
        read.append(scheduler.prefilled_tokens - before)
    assert read[:4] == [40, 40, 40, 0] and sum(read) == 120


def test_cancelled_and_overdue_requests_free_their_slot_at_once():
    model = build("recurrent")
    scheduler = Scheduler(model, n_slots=2, max_queue=3)
    first, second, third, late = (new_request(TOKENIZER, [1, 2 + i], 30, Sampling(0), ()) for i in range(4))
    scheduler.add(first, second)
    scheduler.step()
    scheduler.add(third, late)
    late.deadline = time.monotonic() - 1
    assert scheduler.step() == [late, first, second] and late.finish == "deadline" and late.tokens == []
    first.cancelled = True
    scheduler.step()
    assert first.finish == "cancelled" and len(first.tokens) == 2 and scheduler.running == [second, third]
    third.cancelled = True
    while scheduler.busy:
        scheduler.step()
    assert second.tokens == generate_alone(model, second.ids, Sampling(0, seed=0), 30)


def test_the_queue_is_bounded_and_takes_all_or_none():
    scheduler = Scheduler(build("recurrent"), n_slots=1, max_queue=3)

    def ask(count):
        scheduler.add(*(new_request(TOKENIZER, [1], 5, Sampling(0), ()) for _ in range(count)))

    ask(2)
    with pytest.raises(QueueFull):
        ask(2)
    ask(1)
    with pytest.raises(UserError, match="empty"):
        scheduler.add(new_request(TOKENIZER, [1], 5, Sampling(0), ()), new_request(TOKENIZER, [], 5, Sampling(0), ()))
    assert len(scheduler.waiting) == 3


def test_a_failing_request_does_not_affect_the_others():
    model = build("recurrent")
    model.tok_embed.weight.data[9] = float("nan")  # token 9 makes a sequence non-finite
    scheduler, sampling = Scheduler(model, n_slots=2), Sampling(0.9, top_k=5, seed=4)
    good, bad, next_one = (new_request(TOKENIZER, ids, 8, sampling, ()) for ids in ([1, 3], [1, 9], [1, 4]))
    model.lm_head.bias.data[9] = -1e9
    scheduler.add(good, bad, next_one)
    while scheduler.busy:
        scheduler.step()
    assert bad.finish == "error" and "not finite" in bad.error and bad.tokens == []
    assert good.tokens == generate_alone(model, [1, 3], sampling, 8) and next_one.tokens == generate_alone(
        model, [1, 4], sampling, 8
    )


def test_the_worker_answers_many_threads_at_once():
    model, rng = build("recurrent"), random.Random(3)
    pairs = [some_request(rng) for _ in range(40)]
    with BatchWorker(Scheduler(model, n_slots=5, max_queue=100)) as worker:

        def ask(request):
            done = threading.Event()
            request.notify = lambda: request.finish and done.set()
            worker.submit(request)
            assert done.wait(60)

        threads = [threading.Thread(target=ask, args=(request,)) for request, _ in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for request, sampling in pairs:
        assert request.tokens == generate_alone(model, request.ids, sampling, request.max_new_tokens, request.stop_ids)


def test_the_worker_survives_a_model_that_fails(capsys):
    model = build("recurrent")
    forward, ended = model.forward, threading.Semaphore(0)

    def failing(ids, targets=None, state=None):
        if (ids == 9).any():
            raise RuntimeError("out of memory")
        return forward(ids, state=state)

    model.forward = failing

    def ask(ids):
        request = new_request(TOKENIZER, ids, 5, Sampling(0), (), notify=lambda: request.finish and ended.release())
        worker.submit(request)
        assert ended.acquire(timeout=60)
        return request

    with BatchWorker(Scheduler(model, n_slots=2, max_queue=10)) as worker:
        model.lm_head.bias.data[9] = -1e9
        failed = ask([1, 9])
        assert failed.finish == "error" and "out of memory" not in failed.error
        assert len(ask([1, 4]).tokens) == 5
        left = new_request(TOKENIZER, [1], 40, Sampling(0), ())
        worker.submit(left)
    assert left.finish is not None  # closing ends every request
    assert "out of memory" in capsys.readouterr().err


def test_a_request_that_gets_no_slot_ends_as_well(capsys):
    """Out of memory while its slot is emptied: it is neither waiting nor running then."""
    ended = threading.Event()
    scheduler = Scheduler(build("recurrent"), n_slots=2)
    scheduler.batch.clear = lambda slot, n_tokens: [][slot]
    request = new_request(TOKENIZER, [1], 5, Sampling(0), (), notify=lambda: request.finish and ended.set())
    with BatchWorker(scheduler) as worker:
        worker.submit(request)
        assert ended.wait(60) and request.finish == "error" and isinstance(request.exception, IndexError)
        assert not scheduler.busy
    capsys.readouterr()


def test_no_request_is_left_when_the_worker_closes():
    """Submitted at the same moment it is either refused or ended, so that no thread waits forever."""
    model = build("recurrent")
    for _ in range(20):
        worker = BatchWorker(Scheduler(model, n_slots=1))
        accepted = []

        def ask(worker=worker, accepted=accepted):
            with contextlib.suppress(QueueFull):
                while True:
                    request = new_request(TOKENIZER, [1], 2, Sampling(0), ())
                    worker.submit(request)
                    accepted.append(request)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.01)
        worker.close()
        for thread in threads:
            thread.join()
        assert all(request.finish for request in accepted)


def test_seeds_of_a_batch():
    assert [Sampling(seed=5).offset_seed(index) for index in (0, 3)] == [Sampling(seed=5), replace(Sampling(), seed=8)]
    assert Sampling().offset_seed(3).seed is None
