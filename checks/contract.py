"""Does `forward` keep its side of the contract: shapes, the loss, `other_vars`, and no memory between calls?"""

import torch
import torch.nn.functional as F

from .subject import require, require_close


def shapes(subject):
    """Logits are (B, T, V) and there is a loss, a finite number, exactly when targets are given."""
    model, ids = subject.build(), subject.tokens()
    logits, loss, other_vars = model(ids)
    require(logits.shape == (*ids.shape, subject.args.vocab_size), f"logits have shape {tuple(logits.shape)}")
    require(loss is None, "a loss without targets")
    logits, loss, other_vars = model(ids, targets=ids.roll(-1, 1))
    require(loss is not None and loss.ndim == 0 and loss.isfinite(), f"with targets the loss is {loss}")
    require(all(isinstance(v, torch.Tensor) for v in other_vars.values()), "other_vars holds something not a tensor")


def loss_is_sum_of_terms(subject):
    """The loss is the sum of `loss/*`, which carry their graph; everything else in other_vars is detached."""
    model, ids = subject.build(), subject.tokens()
    _, loss, other_vars = model(ids, targets=ids.roll(-1, 1))
    terms = {k: v for k, v in other_vars.items() if k.startswith("loss/")}
    if terms:
        require_close(sum(terms.values()), loss, "sum of loss/* against the loss", 1e-6)
    for key, value in other_vars.items():
        if key not in terms:
            require(not value.requires_grad, f"other_vars[{key!r}] still carries its graph: detach it")


def train_equals_eval(subject):
    """The loss is the same in train and eval mode, and the same twice."""
    model, ids = subject.build(), subject.tokens()
    losses = [model.train(mode)(ids, targets=ids.roll(-1, 1))[1].detach() for mode in (False, True, False)]
    require_close(losses[1], losses[0], "loss in train mode against eval mode", 1e-6)
    require(torch.equal(losses[0], losses[2]), "two equal calls in eval mode give different losses")


def loss_is_mean_over_valid_targets(subject):
    """`loss/ce` is the mean cross-entropy of the logits over targets that are not -100, in float64 by hand."""
    model, ids = subject.build(), subject.tokens()
    targets = ids.roll(-1, 1)
    targets[0, ::2] = -100
    targets[1] = -100
    _, loss, other_vars = model(ids, targets=targets)
    got = other_vars.get("loss/ce", loss)
    valid = targets != -100
    log_probs = F.log_softmax(model(ids)[0].double(), dim=-1)
    want = -log_probs[valid].gather(1, targets[valid][:, None]).mean()
    require_close(got.double(), want, "loss/ce against the mean over valid targets", 1e-5)


def nothing_to_predict(subject):
    """A batch whose targets are all ignored has a finite loss with a graph, and no task gradient."""
    model, ids = subject.build(), subject.tokens()
    _, loss, other_vars = model(ids, targets=torch.full_like(ids, -100))
    task = other_vars.get("loss/ce", loss)
    require(task.item() == 0.0, f"the loss is {task.item()} although no target is valid")
    task.backward()
    worst = max((p.grad.abs().max().item() for p in model.parameters() if p.grad is not None), default=0.0)
    require(worst == 0.0, f"a gradient of {worst:.3g} although no target is valid")


def nothing_is_modified(subject):
    """Inputs stay as they are, and a call stores nothing on the module."""
    model, ids = subject.build().train(), subject.tokens()
    targets = ids.roll(-1, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    copies = ids.clone(), targets.clone()
    model(ids, targets=targets)
    require(torch.equal(ids, copies[0]) and torch.equal(targets, copies[1]), "forward writes to its inputs")
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    require(not changed, f"forward changes {', '.join(changed)}")
    require(attributes == [set(vars(module)) for module in model.modules()], "forward adds attributes to the module")


def rows_are_independent(subject):
    """A row's logits do not depend on the other rows of the batch."""
    model, ids = subject.build(), subject.tokens(rows=4)
    together = model(ids)[0]
    for row in range(len(ids)):
        require_close(model(ids[row : row + 1])[0][0], together[row], f"row {row} alone against in a batch")


def parameter_groups_cover_all(subject):
    """`param_groups` holds every trainable parameter exactly once; `num_params` agrees with the parameters."""
    model = subject.build()
    groups = model.param_groups()
    grouped = [id(p) for params in groups.values() for p in params]
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in grouped]
    require(not missing, f"param_groups misses {', '.join(missing)}")
    require(len(grouped) == len(set(grouped)), "param_groups holds a parameter twice")
    counts, total = model.num_params(), sum(p.numel() for p in model.parameters())
    require(counts["total"] == total, f"num_params says {counts['total']} of {total} parameters")
    require(counts["active"] <= counts["total"], "more parameters active than there are")
