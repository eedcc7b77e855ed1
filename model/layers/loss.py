"""The cross-entropy of the next token, and the z-loss."""

import torch.nn.functional as F

from model.kernels import dispatch
from model.kernels.loss import faster_token_losses


def lm_loss(hidden, weight, targets, chunk_bytes=None, squares=None):
    """Return the mean cross-entropy of the next token in nats, 0-d fp32; 0 with a graph when no target is valid.

    hidden (B, T, D), weight (V, D) of the output head, targets (B, T) with -100 = ignored. chunk_bytes: of logits held
    at once. squares: a list that gets the mean of log(Z)^2, Z the sum of exp(logits): `loss/z` is `self.z_loss` times
    their sum, and keeps the logits from drifting (PaLM, Chowdhery et al. 2022, section 5).
    """
    targets = targets.reshape(-1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    entropy, square = token_losses(hidden, weight, targets, chunk_bytes, squares is not None)
    count = (targets != -100).sum().clamp(min=1)
    if squares is not None:
        squares.append(square / count)
    return entropy / count


@dispatch(faster_token_losses)
def token_losses(hidden, weight, targets, chunk_bytes=None, with_squares=False):
    """Return the sums of -log p(target) and of log(Z)^2 over the valid targets. hidden (N, D), targets (N,)."""
    logits = F.linear(hidden, weight).float()  # (N, V)
    entropy = F.cross_entropy(logits, targets, reduction="sum")
    squares = logits.logsumexp(dim=-1).square() * (targets != -100)
    return entropy, squares.sum()
