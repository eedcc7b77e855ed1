"""Are the parameters listed, counted and priced right?"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from checks.harness.model_under_test import ModelUnderTest, NotApplicable, call, next_tokens, require
from model import BaseModel

GROUPS = {"matrix", "embed", "scalar"}


def parameter_groups_cover_all(subject: ModelUnderTest):
    """`param_groups` holds every trainable parameter exactly once, in the groups the optimizers know.

    Measured: the groups against `named_parameters`, by identity; "matrix" holds two dimensions or more.
    Causes: an own `param_groups` that goes by names and misses some; a tied table listed in two groups; vectors among
    the matrices, which Muon cannot orthogonalize.
    """
    model = subject.build()
    groups = model.param_groups()
    require(set(groups) <= GROUPS, f"param_groups has the keys {sorted(groups)}, expected {sorted(GROUPS)}")
    names = {id(p): n for n, p in model.named_parameters()}
    grouped = [id(p) for params in groups.values() for p in params]
    foreign = sum(i not in names for i in grouped)
    require(not foreign, f"param_groups holds {foreign} tensors that are not parameters of the model")
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in grouped]
    require(not missing, f"param_groups misses {', '.join(missing[:6])}")
    twice = sorted({names[i] for i in grouped if grouped.count(i) > 1})
    require(not twice, f"param_groups holds {', '.join(twice[:6])} more than once")
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad and id(p) in grouped]
    require(not frozen, f"param_groups holds {', '.join(frozen[:6])}, which needs no gradient")
    flat = [names[id(p)] for p in groups.get("matrix", ()) if p.ndim < 2]
    require(not flat, f"the matrix group holds {', '.join(flat[:6])} of fewer than two dimensions")


def parameters_are_counted(subject: ModelUnderTest):
    """`num_params` agrees with the parameters.

    Measured: the total; the tables of nn.Embedding; active is at most the total, and in a mixture of experts agrees
    within 10% with the multiplications that inference does for one token.
    Causes: a tied table counted twice; buffers counted; a mixture that does not override `num_params`, or forgets
    shared experts, the dense layers or one of the three matrices of an expert.
    """
    model, ids = subject.build(), subject.tokens()
    counts, total = model.num_params(), sum(p.numel() for p in model.parameters())
    missing = {"total", "active", "embedding"} - set(counts)
    require(not missing, f"num_params lacks {', '.join(sorted(missing))}")
    require(counts["total"] == total, f"num_params says {counts['total']} in all, there are {total} parameters")
    require(0 < counts["active"] <= total, f"num_params says {counts['active']} of {total} parameters are active")
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    require(
        counts["embedding"] <= max(tables, total // 2) or not tables,
        f"num_params says {counts['embedding']} in embeddings, the tables hold {tables}",
    )
    with torch.no_grad():
        mixture = "moe/load" in call(model, ids, targets=next_tokens(ids))[2]
    if mixture:
        done = _forward_flops(model, subject.tokens(rows=16, length=1)) / 16
        said = 2 * (counts["active"] - _lookups(model))
        dense = 2 * (total - _lookups(model))  # every expert computed for every token: nothing to compare with
        require(
            _near(said, done) or _near(dense, done),
            f"num_params says {counts['active']} parameters are active: "
            f"{said:.4g} FLOPs a token without lookups; inference does {done:.4g}",
        )


def flops_are_estimated(subject: ModelUnderTest):
    """`flops_per_token` agrees within 10% with what a training step multiplies.

    Measured: the FLOPs of all matrix products and convolutions of forward and backward, counted by torch, on rows of
    eight tokens and of max_seq_len. Where the file overrides nothing the default is only an estimate (it assumes full
    attention in every layer, and each weight used once): then a mixture alone is judged.
    Causes: forward alone counted, or multiply and add as one; the output head or the multi-token modules forgotten; all
    experts counted instead of the active ones; attention counted for layers that have none.
    """
    model = subject.build().train()
    overridden = any(
        getattr(subject.Model, n) is not getattr(BaseModel, n)
        for n in ("flops_per_token", "attention_flops_per_token", "num_params")
    )
    with torch.no_grad():
        mixture = "moe/load" in call(model, subject.tokens(), targets=subject.tokens())[2]
    total = sum(p.numel() for p in model.parameters())
    lengths = (8, subject.args.max_seq_len) if overridden else (8,)
    for length in lengths:
        ids = subject.tokens(rows=4, length=min(length, subject.args.max_seq_len))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call(model, ids, targets=next_tokens(ids))[1].backward()
        done, said = counter.get_total_flops() / ids.numel(), model.flops_per_token(ids.shape[1])
        require(said > 0, f"flops_per_token says {said}")
        if not _near(said, done):
            if not overridden and not mixture:
                raise NotApplicable(
                    f"the default estimate is {said / done:.2f} times the measured count: override "
                    "flops_per_token for true figures of utilisation"
                )
            all_experts = said + 6 * (total - model.num_params()["active"])
            if mixture and "flops_per_token" not in vars(subject.Model) and _near(all_experts, done):
                raise NotApplicable("every expert is computed for every token: flops_per_token counts the active ones")
            require(
                False,
                f"flops_per_token says {said:.4g} at {ids.shape[1]} tokens, a training step does "
                f"{done:.4g}: {said / done:.2f} times",
            )


def _near(said, done):
    return 0.9 * done < said < 1.1 * done


def _forward_flops(model, ids):
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call(model, ids)
    return counter.get_total_flops()


def _lookups(model):
    """Return how many parameters are only looked up: tables of embeddings that are not the output head as well."""
    head = {id(p) for p in getattr(model, "lm_head", torch.nn.Module()).parameters()}
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    return sum(table.numel() for table in tables if id(table) not in head)
