"""Can a position see what comes later? Then training is cheating and generation is noise."""

import torch

from .subject import require


def later_tokens_change_nothing(subject):
    """Changing token t changes no logit before t, for every t; and it does change the logit at t."""
    model, ids = subject.build(), subject.tokens(rows=1)
    base = model(ids)[0][0]
    for t in range(ids.shape[1]):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % subject.args.vocab_size
        difference = (model(changed)[0][0] - base).abs().amax(dim=-1)  # (T,)
        earlier = difference[:t].max().item() if t else 0.0
        # Not exactly zero: a kernel may group its sums by what the whole batch holds (experts do).
        require(earlier < 1e-5, f"token {t} changes logits before it by {earlier:.3g}")
        require(difference[t] > 1e-5, f"token {t} does not change the logits at its own position")


def targets_do_not_leak(subject):
    """The targets change the loss only, not what the model computes: other_vars outside loss/* stay the same."""
    model, ids = subject.build(), subject.tokens()
    first = model(ids, targets=ids.roll(-1, 1))[2]
    second = model(ids, targets=ids.roll(5, 1))[2]
    for key in first:
        if not key.startswith("loss/"):
            require(torch.equal(first[key], second[key]), f"other_vars[{key!r}] depends on the targets")


def gradient_reaches_the_past_only(subject):
    """The gradient of the logit at t with respect to the input embeddings is zero after t and not zero before."""
    model, ids = subject.build(), subject.tokens(rows=1)
    embeddings = []
    table = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding))
    handle = table.register_forward_hook(lambda module, args, out: embeddings.append(out.requires_grad_()) or out)
    logits = model(ids)[0]
    handle.remove()
    last = ids.shape[1] - 1
    for t in range(0, last + 1, 5):
        (grad,) = torch.autograd.grad(logits[0, t].square().sum(), embeddings[0], retain_graph=True)
        size = grad[0].abs().amax(dim=-1)  # (T,)
        require(size[t + 1 :].sum() == 0, f"the logit at {t} has a gradient to later positions")
        require(t == 0 or size[:t].sum() > 0, f"the logit at {t} has no gradient to the past")
