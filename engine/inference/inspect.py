"""What a learner wants to see of an answer: what else could have come, where it was thinking, which experts took it."""

import math

import torch


def spelled(tokenizer, request, start=0):
    """The tokens of an answer from number `start` on, as they can be shown: a list of dicts.

    text: what the token adds to the text; "·" where it is a part of a character that a later one completes. p: how
    likely the model found it, before all filters. top: the likeliest as [text, p], likeliest first.
    """

    def word(token):
        return tokenizer.decode([token], skip_special=False)

    text, starts, tokens = request.text, request.writer.starts, []
    for number in range(start, len(request.logprobs)):
        token, (own, top) = request.tokens[number], request.logprobs[number]
        end = starts[number + 1] if number + 1 < len(starts) else len(text)
        name = word(token)
        tokens.append(
            {
                "text": text[starts[number] : end] or ("·" if "\ufffd" in name else name),
                "p": math.exp(own),
                "top": [[word(other), math.exp(log)] for other, log in top.items()],
            }
        )
    return tokens


def thinking(tokenizer, request):
    """An answer's text as (what was thought, what is said), told apart by <think> and </think>.

    They are single tokens, which leave no text; a model whose data held them as text writes them as text.
    """
    text, tokens, starts = request.text, request.tokens, request.writer.starts
    if tokenizer.think_id in tokens or tokenizer.end_think_id in tokens:
        begin = starts[tokens.index(tokenizer.think_id)] if tokenizer.think_id in tokens else 0
        end = starts[tokens.index(tokenizer.end_think_id)] if tokenizer.end_think_id in tokens else len(text)
        return text[begin:end].strip(), (text[:begin] + text[end:]).strip()
    if text.lstrip().startswith("<think>"):
        thought, _, said = text.lstrip().removeprefix("<think>").partition("</think>")
        return thought.strip(), said.strip()
    return "", text


def is_load(name, value):
    """Whether an entry of other_vars is the load of experts: `.../load...`, one row a layer."""
    return name.rpartition("/")[2].startswith("load") and value.ndim == 2


@torch.inference_mode()
def expert_loads(model, ids, first):
    """{name: (T, L, E)}: how many tokens each expert of each layer takes, for the tokens ids[first:], one at a time.

    `other_vars` sums over the tokens of a call, so each gets a call of its own. Of a model without `state` the sum over
    the whole text is all there is: T is 1. Empty for a model that reports no load.
    """
    device, found = next(model.parameters()).device, {}

    def read(tokens, **state):
        return model(torch.tensor([tokens], device=device), **state)[2]

    if not model.accepts("state"):
        readings = [read(ids)]
    else:
        state, readings = model.init_state(1, len(ids)), []
        for part in [ids[:first], *([token] for token in ids[first:])]:
            if part:
                readings.append(read(part, state=state))
                state.advance(len(part))
        readings = readings[1:] if first else readings
    for reading in readings:
        for name, value in reading.items():
            if is_load(name, value):
                found.setdefault(name, []).append(value.cpu())
    return {name: torch.stack(values) for name, values in found.items()}


def reports_load(model):
    """Whether `expert_loads` has something to tell of this model."""
    return bool(expert_loads(model, [0], 0))
