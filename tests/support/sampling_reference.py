"""The sampling filters and generation by their definitions, one token at a time."""

import math

import torch

from tests.support.decoding_models import LONGEST, V


def probabilities(logits, temperature, top_k, top_p, min_p):
    """The definitions, one token at a time, in Python's own float64."""
    scores = [value / temperature for value in logits]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = order[:top_k] if top_k else order
    weights = {i: math.exp(scores[i] - scores[order[0]]) for i in kept}
    total, kept, mass = sum(weights.values()), [], 0.0
    for i in order[: len(weights)]:
        if mass >= top_p and top_p < 1:
            break
        kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(scores))]


@torch.no_grad()
def generate_alone(model, ids, sampling, max_new_tokens, stops=()):
    """An answer by its definition: run all tokens again for each one, penalize, filter, invert the distribution."""
    answer = []
    n_tokens = min(max_new_tokens, LONGEST - len(ids))
    uniforms = 1 - torch.rand(n_tokens, generator=torch.Generator().manual_seed(sampling.seed))
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
            few = 0 < sampling.top_k < V or sampling.top_p < 1  # then the draw goes by decreasing probability
            cumulative, order = 0.0, likeliest_first if few else range(V)
            for token in order:
                cumulative += probs[token]
                if cumulative >= uniform:
                    break
        if token in stops:
            break
        answer.append(token)
    return answer
