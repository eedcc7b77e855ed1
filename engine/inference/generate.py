"""Text from a model, by the contract alone: with `state` when the model takes it, else by reading the prefix again."""

from engine.inference.request import Request
from engine.inference.sampling import Sampling
from engine.inference.scheduler import Batch, room
from engine.inference.speculative import speculate
from utils.errors import UserError


def generate(model, tokenizer, prompt_ids, max_new_tokens, stop_ids=None, stop=(), speculative="", **sampling):
    """Answer a batch of prompts of any lengths: a list of token ids a prompt, without the prompt and the stop token.

    `prompt_ids` is a list of lists of ids; `stop_ids` defaults to the end of a document or of a turn, `stop` are
    strings; `sampling` takes the fields of `Sampling`; `speculative` is "mtp" or "ngram" (engine/inference/speculative.py), for
    one prompt after another. A row ends at a stop, after max_new_tokens, or when prompt and
    answer fill max_seq_len. Raises UserError for an empty prompt, one that leaves no room, or an id the model does not
    have.
    """
    sampling = Sampling(**sampling)
    requests = [
        new_request(tokenizer, ids, max_new_tokens, sampling.of_row(row), stop_ids, stop)
        for row, ids in enumerate(prompt_ids)
    ]
    for _ in decode(model, requests, speculative):
        pass
    return [request.tokens for request in requests]


def stream(model, tokenizer, ids, max_new_tokens, stop_ids=None, stop=(), speculative="", **sampling):
    """Answer one prompt as it is written: an iterator of token ids; arguments and errors as in `generate`."""
    request = new_request(tokenizer, ids, max_new_tokens, Sampling(**sampling), stop_ids, stop)
    given = 0
    for _ in decode(model, [request], speculative):
        yield from request.tokens[given:]
        given = len(request.tokens)


def new_request(tokenizer, ids, max_new_tokens, sampling, stop_ids=None, stop=(), text=False, **more):
    """A `Request` that ends where documents and turns do, unless other `stop_ids` are given."""
    stop_ids = {tokenizer.eos_id, tokenizer.im_end_id} if stop_ids is None else set(stop_ids)
    return Request(ids, max_new_tokens, sampling, stop_ids, tokenizer if text or stop else None, stop, **more)


def decode(model, requests, speculative=""):
    """Answer requests side by side, or speculating one after another: yields after each step the requests that moved.

    UserError for a prompt that cannot be answered, and when the model's numbers are no longer finite.
    """
    was_training = model.training
    model.eval()
    try:
        for moved in _speculate(model, requests, speculative) if speculative else _side_by_side(model, requests):
            for request in moved:
                if request.error:
                    raise UserError(request.error)
            yield moved
    finally:
        model.train(was_training)


def _side_by_side(model, requests):
    if not requests:
        return
    longest = max(len(request.ids) + room(model, request.ids, request.max_new_tokens) for request in requests)
    batch = Batch(model, len(requests), longest)
    batch.add(*requests)
    while batch.busy:
        yield batch.step()


def _speculate(model, requests, kind):
    for request in requests:
        yield from speculate(model, request, kind)
