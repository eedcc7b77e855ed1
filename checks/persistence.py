"""Is the complete state of the model saved?"""

import torch
from safetensors.torch import load, save
from torch import nn

from checks.harness import ModelUnderTest, call, logits_of, next_tokens, require, require_close, train_steps
from model.basemodel import BaseModel


def _trained(tested: ModelUnderTest) -> BaseModel:
    """Return a model that has taken a few steps, its hooks included, in eval mode."""
    model, ids = tested.build(seed=0), tested.tokens()
    train_steps(model.train(), [(ids, next_tokens(ids))] * 2, lr=1e-3)
    with torch.no_grad():
        other_vars = call(model, ids, targets=next_tokens(ids))[2]
    for step in range(50):  # far enough for a bias to change a choice
        model.before_step(50 + step, 100)
        model.after_step({k: v.detach() for k, v in other_vars.items()})
    return model.eval()


@torch.no_grad()
def saved_weights_restore_the_model(tested: ModelUnderTest) -> None:
    """A fresh model with the saved weights of a trained one gives the same logits.

    Measured: two optimizer steps and fifty calls of the hooks; the state_dict through safetensors; into a model that
    was initialised from another seed.
    Causes: a buffer that matters registered with `persistent=False`; a tensor that is a plain attribute; layers in a
    Python list instead of a ModuleList; random projections drawn at construction; a schedule of `before_step` or a bias
    of `after_step` kept as a Python number that the logits depend on.
    """
    with torch.enable_grad():
        model = _trained(tested)
    ids = tested.tokens()
    want = logits_of(model, ids)
    saved = save({k: v.clone().contiguous() for k, v in model.state_dict().items()})
    fresh = tested.build(seed=7)
    fresh.load_state_dict(load(saved))
    require_close(logits_of(fresh, ids), want, "logits after saving and loading", 1e-6)


def tied_weights_stay_tied(tested: ModelUnderTest) -> None:
    """Parameters that are one tensor before saving are one after loading and moving; no two only share their memory.

    Measured: the names under which each parameter appears, in the model and in a fresh one that loaded its weights and
    changed its type and back; the memory of each parameter; tables that start equal but are not one.
    Causes: tying by `.data =` (two parameters on one memory, updated twice) or by a copy (which diverges at step 1);
    tying in a method that is not called again; an own `load_state_dict`.
    """
    model = tested.build(unit_gain=False)
    fresh = tested.build(seed=7)
    fresh.load_state_dict(model.state_dict())
    fresh = fresh.double().float()
    before, after = _names_of_each(model), _names_of_each(fresh)
    for names in before:
        require(names in after, f"{' and '.join(names)} are one parameter, and not any more after loading")
    for names in after:
        require(names in before, f"{' and '.join(names)} are one parameter after loading, and were not before")
    owner: dict[int, str] = {}
    for name, param in model.named_parameters():
        if param.numel():
            other = owner.setdefault(param.untyped_storage().data_ptr(), name)
            require(
                other == name,
                f"{name} and {other} share their memory but are two parameters",
                ["tying by `.data`: assign the Parameter itself, a.weight = b.weight"],
            )
    for table_name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            for name, param in model.named_parameters():
                another = param is not module.weight and param.shape == module.weight.shape
                same = another and torch.equal(param, module.weight) and bool(param.std() > 0)
                require(
                    not same,
                    f"{name} and {table_name}.weight start equal but are two parameters: they diverge at step 1",
                    ["tying by copying: assign the Parameter itself, a.weight = b.weight"],
                )


def _names_of_each(model: BaseModel) -> set[tuple[str, ...]]:
    """Return the set of tuples of names under which each parameter appears."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return {tuple(sorted(n)) for n in names.values()}


@torch.no_grad()
def buffers_keep_their_precision(tested: ModelUnderTest) -> None:
    """What `after_step` moves is a persistent fp32 buffer: in the state_dict, and fine enough for small steps.

    Measured: the buffers that change over fifty calls of `after_step`.
    Causes: a routing bias that is registered with `persistent=False`, or kept in half precision, where steps of 0.001
    vanish.
    """
    model, ids = tested.build(), tested.tokens()
    before = {k: v.clone() for k, v in model.named_buffers()}
    other_vars = call(model.train(), ids, targets=next_tokens(ids))[2]
    for _ in range(50):
        model.after_step({k: v.detach() for k, v in other_vars.items()})
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer, before[name]):
            require(name in model.state_dict(), f"{name} is moved by after_step and not saved")
            fine = not buffer.is_floating_point() or buffer.dtype in (torch.float32, torch.float64)
            require(fine, f"{name} is moved by after_step in {buffer.dtype}")
