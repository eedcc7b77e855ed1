"""Token-level inspection of an answer: probabilities with alternatives, the reasoning, and the expert load."""

import math
from typing import Any

import torch

from engine.inference.request import Logprobs
from model.basemodel import BaseModel, is_expert_load
from utils.tokenizer import Tokenizer


def token_details(
    tokenizer: Tokenizer, tokens: list[int], logprobs: list[Logprobs], starts: list[int], text: str, first: int = 0
) -> list[dict[str, Any]]:
    """Return what can be shown of each token of an answer from index `first` on, as a list of dicts.

    starts: characters of `text` before each token. In the dicts, text: its text, "·" for an incomplete character
    that a later token completes; p: its probability before all filters; top: the likeliest tokens as
    [text, p], likeliest first.
    """

    def name_of(token: int) -> str:
        return tokenizer.decode([token], skip_special=False)

    details = []
    for index in range(first, len(tokens)):
        token = tokens[index]
        own, top = logprobs[index]
        end = starts[index + 1] if index + 1 < len(starts) else len(text)
        name = name_of(token)
        details.append(
            {
                "text": text[starts[index] : end] or ("·" if "\ufffd" in name else name),
                "p": math.exp(own),
                "top": [[name_of(other), math.exp(logprob)] for other, logprob in top.items()],
            }
        )
    return details


def split_reasoning(tokenizer: Tokenizer, tokens: list[int], starts: list[int], text: str) -> tuple[str, str]:
    """Split an answer at <think> and </think> into (reasoning, reply).

    They are single tokens without text; a model whose training data held them as text writes them as text, and so does
    one with a tokenizer to which they are text.
    """
    if tokenizer.think_id in tokenizer.special_ids and {tokenizer.think_id, tokenizer.end_think_id} & {*tokens}:
        begin = starts[tokens.index(tokenizer.think_id)] if tokenizer.think_id in tokens else 0
        end = starts[tokens.index(tokenizer.end_think_id)] if tokenizer.end_think_id in tokens else len(text)
        return text[begin:end].strip(), (text[:begin] + text[end:]).strip()
    if text.lstrip().startswith("<think>"):
        reasoning, _, reply = text.lstrip().removeprefix("<think>").partition("</think>")
        return reasoning.strip(), reply.strip()
    return "", text


@torch.inference_mode()
def expert_loads(model: BaseModel, ids: list[int], first: int) -> dict[str, torch.Tensor]:
    """Return {name: (T, L, E)}: tokens routed to each expert of each layer, for each of the tokens ids[first:].

    `other_vars` sums over the tokens of a call, so each token gets its own. Without `state` there is only the sum over
    all tokens: T is 1. Empty for a model that reports no load.
    """
    device = next(model.parameters()).device

    def forward(tokens: list[int], **state: Any) -> dict[str, torch.Tensor]:
        return model(torch.tensor([tokens], device=device), **state)[2]

    if not model.accepts("state"):
        per_call = [forward(ids)]
    else:
        state = model.init_state(1, len(ids))
        per_call = []
        for part in [ids[:first], *([token] for token in ids[first:])]:
            if part:
                per_call.append(forward(part, state=state))
                state.advance(len(part))
        per_call = per_call[1:] if first else per_call
    loads: dict[str, list[torch.Tensor]] = {}
    for other_vars in per_call:
        for name, value in other_vars.items():
            if is_expert_load(name, value):
                loads.setdefault(name, []).append(value.cpu())
    return {name: torch.stack(values) for name, values in loads.items()}


def reports_expert_load(model: BaseModel) -> bool:
    """Return whether the model reports the load of its experts."""
    return bool(expert_loads(model, [0], 0))
