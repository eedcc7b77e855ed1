"""Text from a model through the contract alone: with its state if it has one, else by running all tokens again."""

from collections.abc import Iterable, Iterator
from typing import Any

from engine.inference.batch import DecodeStep
from engine.inference.request import Request
from engine.inference.sampling import Sampling
from engine.inference.scheduler import Scheduler, max_completion_tokens
from engine.inference.speculative import SpeculativeScheduler
from engine.inference.threads import kept_threads
from model.basemodel import BaseModel
from utils.errors import UserError
from utils.tokenizer import Tokenizer


def generate(
    model: BaseModel,
    tokenizer: Tokenizer,
    prompt_ids: list[list[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int] | None = None,
    stop: Iterable[str] = (),
    speculative: str = "",
    decode_step: DecodeStep | None = None,
    **sampling: Any,
) -> list[list[int]]:
    """Answer a batch of prompts of any lengths: a list of token ids per prompt, without the prompt and the stop token.

    stop_ids: default the end of a document or of a turn; stop: strings; sampling: the fields of `Sampling`;
    speculative: "draft" or "ngram" (engine/inference/speculative.py), one prompt after another; decode_step: as
    `prepare_for_decoding` returns it. An answer ends at a stop, after max_new_tokens, or when prompt and answer fill
    max_seq_len. UserError for an empty prompt, one that leaves no room, or an id outside the vocabulary.
    """
    settings = Sampling(**sampling)
    requests = [
        new_request(tokenizer, ids, max_new_tokens, settings.offset_seed(index), stop_ids, stop)
        for index, ids in enumerate(prompt_ids)
    ]
    for _ in decode(model, requests, speculative, decode_step):
        pass
    return [request.tokens for request in requests]


def stream(
    model: BaseModel,
    tokenizer: Tokenizer,
    ids: list[int],
    max_new_tokens: int,
    stop_ids: Iterable[int] | None = None,
    stop: Iterable[str] = (),
    speculative: str = "",
    **sampling: Any,
) -> Iterator[int]:
    """Yield the token ids of one answer as they are generated; arguments and errors as in `generate`."""
    request = new_request(tokenizer, ids, max_new_tokens, Sampling(**sampling), stop_ids, stop)
    n_yielded = 0
    for _ in decode(model, [request], speculative):
        yield from request.tokens[n_yielded:]
        n_yielded = len(request.tokens)


def new_request(
    tokenizer: Tokenizer,
    ids: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Iterable[int] | None = None,
    stop: Iterable[str] = (),
    text: bool = False,
    **options: Any,
) -> Request:
    """Return a `Request` that ends at the end of a document or turn, unless other `stop_ids` are given.

    text: detokenize the answer, as stop strings do in any case. options: further arguments of `Request`.
    """
    stop_ids = set(tokenizer.stop_ids if stop_ids is None else stop_ids)
    return Request(ids, max_new_tokens, sampling, stop_ids, tokenizer if text or stop else None, stop, **options)


def decode(
    model: BaseModel, requests: list[Request], speculative: str = "", decode_step: DecodeStep | None = None
) -> Iterator[list[Request]]:
    """Answer requests, side by side or, with speculation, one after another; yields those that changed in each step.

    UserError for a prompt that cannot be answered, and for non-finite logits.
    """
    if not requests:
        return
    was_training = model.training
    model.eval()
    try:
        max_len = max(
            len(request.ids) + max_completion_tokens(model, request.ids, request.max_new_tokens) for request in requests
        )
        scheduler = (
            SpeculativeScheduler(model, speculative, max_len, decode_step=decode_step)
            if speculative
            else Scheduler(model, len(requests), max_len, decode_step=decode_step)
        )
        scheduler.add(*requests)
        while scheduler.busy:
            with kept_threads():  # the caller goes on between two steps
                changed = scheduler.step()
            for request in changed:
                if request.error:
                    raise UserError(request.error)
            yield changed
    finally:
        model.train(was_training)
