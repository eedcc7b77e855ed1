"""Is everything that matters saved?"""

import torch
from safetensors.torch import load, save

from .subject import require, require_close


@torch.no_grad()
def saved_weights_restore_the_model(subject):
    """A fresh model with the saved weights of a trained one gives the same logits, moved buffers included."""
    model, ids = subject.build(seed=0), subject.tokens()
    with torch.enable_grad():
        _, _, other_vars = model.train()(ids, targets=ids.roll(-1, 1))
    for _ in range(50):
        model.after_step({k: v.detach() for k, v in other_vars.items()})
    want = model.eval()(ids)[0]
    saved = save({k: v.clone() for k, v in model.state_dict().items()})
    fresh = subject.build(seed=7)
    fresh.load_state_dict(load(saved))
    require_close(fresh(ids)[0], want, "logits after saving and loading", 1e-6)


def tied_weights_stay_tied(subject):
    """Parameters that are one tensor before saving are one tensor after loading."""
    model = subject.build()
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    fresh = subject.build(seed=7)
    fresh.load_state_dict(model.state_dict())
    for one in names:
        for other in names:
            tied = model.get_parameter(one) is model.get_parameter(other)
            again = fresh.get_parameter(one) is fresh.get_parameter(other)
            require(tied == again, f"{one} and {other} are tied in one model only")
