"""The sampling filters by their definitions, one token at a time."""

import math


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
