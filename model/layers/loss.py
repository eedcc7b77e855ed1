"""The cross-entropy of the next token, and the z-loss."""

import torch.nn.functional as F

from model.kernels import dispatch
from model.kernels.loss import faster_token_losses


class ZLoss:
    """The z-loss of one forward: weight * mean(log(Z)^2), Z the sum of exp(logits) (PaLM, Chowdhery et al. 2022, section 5).

    It keeps the logits from drifting. Hand it to `lm_loss`, and add `terms()` to other_vars. Weight 0: no term.
    """

    def __init__(self, weight):
        self.weight = weight
        self.means = []  # one per call of lm_loss

    def terms(self):
        return {"loss/z": self.weight * sum(self.means)} if self.means else {}


def lm_loss(hidden, weight, targets, chunk_bytes=None, z_loss=None):
    """Return the mean cross-entropy of the next token in nats, 0-d fp32; 0 with a graph when no target is valid.

    hidden (B, T, D), weight (V, D) of the output head, targets (B, T) with -100 = ignored. chunk_bytes: of logits held
    at once. z_loss: a `ZLoss` that takes its part from the same logits.
    """
    with_squares = z_loss is not None and z_loss.weight != 0
    targets = targets.reshape(-1)
    entropy, squares = token_losses(hidden.reshape(-1, hidden.shape[-1]), weight, targets, chunk_bytes, with_squares)
    count = (targets != -100).sum().clamp(min=1)
    if with_squares:
        z_loss.means.append(squares / count)
    return entropy / count


@dispatch(faster_token_losses)
def token_losses(hidden, weight, targets, chunk_bytes=None, with_squares=False):
    """Return the sums of -log p(target) and of log(Z)^2 over the valid targets. hidden (N, D), targets (N,)."""
    logits = F.linear(hidden, weight).float()  # (N, V)
    entropy = F.cross_entropy(logits, targets, reduction="sum")
    squares = logits.logsumexp(dim=-1).square() * (targets != -100)
    return entropy, squares.sum()


def sum_of_losses(other_vars):
    """Return the loss: the sum of the terms `loss/*`, in their order."""
    return sum(value for name, value in other_vars.items() if name.startswith("loss/"))
