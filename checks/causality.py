"""Does a position see later tokens? Then training leaks the targets and generation fails."""

import torch
from torch import Tensor

from checks.harness import ModelUnderTest, call, logits_of, next_tokens, require, require_close
from checks.harness.model_under_test import (
    LONG,
    embedded_tokens,
    gradient_at_tokens,
    negative_log_likelihood,
    positions_text,
)

# A kernel may group its sums by what the full batch holds (experts do), an FFT mixes all positions in rounding.
ROUNDING = 2e-5


@torch.no_grad()
def later_tokens_change_nothing(tested: ModelUnderTest) -> None:
    """Changing token t changes no logit before t, for every t, in both modes; and it does change the logit at t.

    Measured: every token of a sequence replaced in turn, the logits against those of the original sequence.
    Causes: no causal mask, or one off by one (`triu(diagonal=2)`, `>` for `>=`); a softmax, a norm or a mean over the
    time axis; a convolution padded on both sides; experts that choose tokens, or a top-k over the sequence; a token
    shift in the wrong direction; batch statistics."""
    ids = tested.tokens(batch_size=1)
    for train in (False, True):
        model = tested.build().train(train)
        torch.manual_seed(0)
        base = logits_of(model, ids)[0]
        for t in range(ids.shape[1]):
            changed = ids.clone()
            changed[0, t] = (ids[0, t] + 1) % tested.args.vocab_size
            torch.manual_seed(0)
            difference = (logits_of(model, changed)[0] - base).abs().amax(dim=-1)  # (T,)
            _nothing_before(difference, t, base, "train" if train else "eval")
            require(
                train or difference[t] > ROUNDING,
                f"token {t} does not change the logits at its own position",
                [
                    "a mask that hides the position itself, and no residual connection around it",
                    "the logits belong to another position: the sequence is shifted inside the model",
                ],
            )


def _nothing_before(difference: Tensor, t: int, base: Tensor, where: str) -> None:
    seen = (difference[:t] > ROUNDING * max(1.0, base.abs().max().item())).nonzero()[:, 0]
    require(
        not len(seen),
        f"{where} mode: token {t} changes the logits at the earlier positions "
        f"{positions_text(seen)} by up to {difference[:t].max().item() if t else 0:.3g}",
    )


@torch.no_grad()
def long_sequences(tested: ModelUnderTest) -> None:
    """The same on a sequence of 300 tokens: beyond windows, chunks and short tables.

    Measured: tokens at twelve positions, around 16, 32, 64, 128 and 256, replaced in turn.
    Causes: chunks that are processed with their neighbours' tokens; a mask buffer that is shorter than the sequence; an
    offset that is right for the first chunk only.
    """
    model, ids = tested.build_long(), tested.tokens(batch_size=1, length=LONG)
    base = logits_of(model, ids)[0]
    for t in (1, 16, 33, 64, 65, 100, 128, 130, 192, 256, 258, LONG - 1):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % tested.args.vocab_size
        difference = (logits_of(model, changed)[0] - base).abs().amax(dim=-1)
        _nothing_before(difference, t, base, "eval")


def gradient_reaches_the_past_only(tested: ModelUnderTest) -> None:
    """The gradient of the logit at t with respect to the embedded tokens is zero after t, and not zero before it.

    Measured: one backward pass per position, in a sequence of max_seq_len tokens.
    Causes: as for `later_tokens_change_nothing`; and where the past has no gradient: a mask that leaves only the
    position itself, a `.detach()` or `no_grad` around keys, values or the recurrent state.
    """
    model, ids = tested.build(), tested.tokens(batch_size=1)
    with embedded_tokens(model) as outputs:
        logits = logits_of(model, ids)
    for t in range(ids.shape[1]):
        size = gradient_at_tokens(logits[0, t].square().sum(), outputs)[0]  # (T,)
        later = (size[t + 1 :] > ROUNDING * size.max()).nonzero()[:, 0] + t + 1
        require(not len(later), f"the logit at {t} has a gradient to the later positions {positions_text(later)}")
        require(size[t] > 0, f"the logit at {t} has no gradient to its own token")
        require(
            t == 0 or size[:t].sum() > 0,
            f"the logit at {t} has no gradient to any earlier token",
            ["the mask leaves only the position itself", "keys, values or the recurrent state are detached"],
        )


@torch.no_grad()
def prefixes_agree(tested: ModelUnderTest) -> None:
    """The logits of the first n tokens do not depend on how many tokens, padding included, follow them.

    Measured: every prefix of a sequence alone against the full sequence; the task loss of a sequence against that of
    the sequence with padding after it, whose targets are -100.
    Causes: a scale, a position or a decay counted from the end or from the length of the sequence; a norm over time;
    padding that is counted in routing, in a mean or in the loss."""
    model, ids = tested.build(), tested.tokens(batch_size=2)
    full, total = logits_of(model, ids), ids.shape[1]
    for n in range(1, total):
        require_close(logits_of(model, ids[:, :n]), full[:, :n], f"the first {n} tokens alone against all {total}")
    n = total - 5
    targets = next_tokens(ids)
    targets[:, n:] = -100
    padded = tested.task_loss(*call(model, ids, targets=targets)[1:])
    alone = tested.task_loss(*call(model, ids[:, :n], targets=targets[:, :n])[1:])
    require_close(padded, alone, "loss with padding after the sequence against the loss without", 1e-4)


def losses_see_the_past_only(tested: ModelUnderTest) -> None:
    """No term of the loss sees the token that it predicts, nor what follows it: multi-token heads included.

    Measured: with one valid target in the sequence, the gradient of each `loss/*` at the embedded tokens after that
    position, against the same without any target (a balance loss does not look at targets).
    Causes: a multi-token head at depth k that reads the embedding of token i + k + 1, its own answer, instead of i + k;
    a second head on a stream that has no causal mask.
    """
    tested.needs_repeatable_backward()
    model, ids = tested.build(), tested.tokens(batch_size=1)

    def gradients(targets: Tensor) -> dict[str, Tensor]:
        with embedded_tokens(model) as outputs:
            _, loss, other_vars = call(model, ids, targets=targets)
        terms = {k: v for k, v in other_vars.items() if k.startswith("loss/")} or {"loss": loss}
        return {k: gradient_at_tokens(v, outputs)[0] for k, v in terms.items()}

    nothing = torch.full_like(ids, -100)
    without = gradients(nothing)
    for t in range(0, ids.shape[1] - 1, 3):
        targets = nothing.clone()
        targets[0, t] = ids[0, t + 1]
        for key, size in gradients(targets).items():
            change = (size - without[key]).abs()
            later = (change[t + 1 :] > ROUNDING * change.max() + 1e-9).nonzero()[:, 0] + t + 1
            require(
                not len(later),
                f"{key} of the target at {t}, which is token {t + 1}, has a gradient to the tokens "
                f"at {positions_text(later)}",
            )


@torch.no_grad()
def targets_do_not_leak(tested: ModelUnderTest) -> None:
    """The targets change the loss only, never what the model predicts.

    Measured: the task loss for three sets of targets against the -log p of the same targets by the logits of a call
    without targets. A model that sees its targets has a lower loss.
    Causes: targets embedded and mixed into the input; a multi-token head that reads the token it should predict; a
    routing or a mask made from the targets.
    """
    model, ids = tested.build(), tested.tokens()
    logits = logits_of(model, ids)
    for targets in (next_tokens(ids), tested.tokens(seed=8), ids):
        got = tested.task_loss(*call(model, ids, targets=targets)[1:]).item()
        want = negative_log_likelihood(logits, targets).mean().item()
        require(
            abs(got - want) < 1e-3 * max(1.0, abs(want)),
            f"the loss is {got:.5g}, but the logits without targets give {want:.5g} for the same targets",
        )
