"""The z-loss of every model: it keeps the normaliser of the softmax near 1, and with it the logits from drifting."""

from model.layers import log_normalisers
from utils.errors import UserError


def with_z_loss(forward, weight: float):
    """Return `forward` with one more term, "loss/z": weight x mean(log Z ^ 2), Z the sum of exp(logits) of a target.

    It is taken where the logits are, in `lm_loss`, once for each call (multi-token prediction calls it once a depth).
    Source: PaLM (Chowdhery et al. 2022), section 5. UserError at the first call for a model that has its own loss.
    """

    def forward_with_z(**batch):
        with log_normalisers() as squares:
            logits, loss, other_vars = forward(**batch)
        if not squares:
            raise UserError(
                "--z_loss is computed in lm_loss of model/layers/__init__.py, and this model does not call it: "
                "call it, or set --z_loss=0"
            )
        z = weight * sum(squares)
        return logits, loss + z, {**other_vars, "loss/z": z}

    return forward_with_z
