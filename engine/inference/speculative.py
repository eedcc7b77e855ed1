"""Speculative decoding: guesses at the next tokens are read together with the last one, and kept where they are right.

A guess is right when it is the token that the model, with the request's own settings and random numbers, writes there
anyway. So the answer is token for token the one without speculation, greedy or sampled, and only the number of the
model's calls differs. (For a guess that is certain of itself, the rule of Leviathan et al. 2023, section 2.3, accepts
with the same probability p(guess), and what follows a refused one has the same distribution.)
"""

import torch

from engine.inference.batch import read
from engine.inference.scheduler import choose, room
from utils.errors import UserError

KINDS = ("mtp", "ngram")
NGRAM = (3, 2)  # tokens that must match, the longer first
NGRAM_GUESSES = 6  # tokens that are copied from behind the match


@torch.inference_mode()
def speculate(model, request, kind):
    """Answer one request: yields [request] after each call of the model.

    Counts `request.calls` of the model, `request.guesses`, and `request.hits` among them. UserError as `Batch.add`, and
    for a model that cannot.
    """
    check_speculative(model, kind)
    limit = room(model, request.ids, request.max_new_tokens)
    device = next(model.parameters()).device
    request.start(limit, model.args.vocab_size, device)
    longest = len(request.ids) + limit
    state = model.init_state(1, longest)
    guesser = Drafts(model, longest) if kind == "mtp" else look_up
    unread, guesses = list(request.ids), []  # what the state has not seen; what may follow
    while request.finish is None:
        if request.cancelled or request.overdue():
            request.end("cancelled" if request.cancelled else "deadline")
            request.notify()
            yield [request]
            return
        before = state.clone() if guesses and not state.can_rewind() else None
        state.last_only, known = not guesses, len(unread) - 1
        logits = read(model, torch.tensor([unread + guesses], device=device), state)[0]
        state.advance(len(unread) + len(guesses))
        hidden, written = state.hidden, len(request.tokens)
        request.calls += 1
        request.guesses += len(guesses)
        for guess, row in zip([*guesses, None], logits[-1 - len(guesses) :]):
            choose([request], row[None])
            if request.finish is not None or request.tokens[-1] != guess:
                break
        new = request.tokens[written:]
        right = sum(guess == token for guess, token in zip(guesses, new))
        request.hits += right
        if request.finish is None:
            if right == len(guesses):
                unread = new[-1:]
            elif before is None:
                state.rewind(len(guesses) - right)
                unread = new[-1:]
            else:  # a memory that only goes forward: read again what was right
                state, unread = before, unread + new
            if hidden is not None:
                hidden = hidden[:, : known + len(new)]
            guesses = guesser(request, hidden, new)[: limit - len(request.tokens) - 1]
        request.notify()
        yield [request]


def check_speculative(model, kind):
    """UserError when the model cannot speculate so."""
    if kind not in KINDS:
        raise UserError(f"--speculative={kind}: choose one of {', '.join(KINDS)}")
    if not model.accepts("state"):
        raise UserError(
            f"--speculative={kind} needs a model whose forward takes `state`, and {model.model_name} does "
            "not: leave it out"
        )
    if kind == "mtp" and model.draft is None:
        raise UserError(
            f"--speculative=mtp needs a model with a module that drafts, and this {model.model_name} has "
            "none: use --speculative=ngram, or train one with such a module"
        )


class Drafts:
    """The model's own draft of one token, the likeliest (DeepSeek-V3, section 2.2.3), with a state of its own."""

    def __init__(self, model, longest):
        self.model, self.state = model, model.init_state(1, longest)
        self.state.last_only = True

    def __call__(self, request, hidden, new):
        # Each position goes in with the token that follows it: the settled ones only, so nothing is ever taken back.
        seen = self.state.max_pos
        text = request.ids + request.tokens
        ids = torch.tensor([text[seen + 1 :]], device=hidden.device)
        logits = self.model.draft(hidden[:, -ids.shape[1] :], ids, self.state)[0]
        self.state.advance(ids.shape[1])
        return [logits[0, -1].argmax().item()]


def look_up(request, hidden, new):
    """What followed the last time that the text ended like this (prompt lookup): a model that quotes is sped up."""
    text = request.ids + request.tokens
    for n in NGRAM:
        tail = text[-n:]
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == tail:
                return text[start + n : start + n + NGRAM_GUESSES]
    return []
