"""Are the parameters listed, counted and priced right?"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from checks.harness import ModelUnderTest, NotApplicable, call, next_tokens, require
from model import BaseModel

GROUPS = {"matrix", "embed", "scalar"}


def parameter_groups_cover_all(tested: ModelUnderTest) -> None:
    """`param_groups` holds every trainable parameter exactly once, in the groups the optimizers know.

    Measured: the groups against `named_parameters`, by identity; "matrix" holds two dimensions or more.
    Causes: an own `param_groups` that goes by names and misses some; a tied table listed in two groups; vectors among
    the matrices, which Muon cannot orthogonalize.
    """
    model = tested.build()
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


def parameters_are_counted(tested: ModelUnderTest) -> None:
    """`num_params` agrees with the parameters.

    Measured: the total; the tables of nn.Embedding; active is at most the total, and in an MoE model agrees
    within 10% with the multiplications that inference does for one token.
    Causes: a tied table counted twice; buffers counted; an MoE model that does not override `num_params`, or forgets
    shared experts, the dense layers or one of the three matrices of an expert.
    """
    model, ids = tested.build(), tested.tokens()
    counts, total = model.num_params(), sum(p.numel() for p in model.parameters())
    missing = {"total", "active", "embedding"} - set(counts)
    require(not missing, f"num_params lacks {', '.join(sorted(missing))}")
    require(
        counts["total"] == total, f"num_params gives a total of {counts['total']}, the model has {total} parameters"
    )
    require(0 < counts["active"] <= total, f"num_params counts {counts['active']} of {total} parameters as active")
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    require(
        counts["embedding"] <= max(tables, total // 2) or not tables,
        f"num_params counts {counts['embedding']} parameters in embeddings, the tables hold {tables}",
    )
    with torch.no_grad():
        is_moe = "moe/load" in call(model, ids, targets=next_tokens(ids))[2]
    if is_moe:
        done = _forward_flops(model, tested.tokens(batch_size=16, length=1)) / 16
        expected = 2 * (counts["active"] - _lookups(model))
        dense = 2 * (total - _lookups(model))  # every expert computed for every token: nothing to compare with
        require(
            _near(expected, done) or _near(dense, done),
            f"num_params counts {counts['active']} active parameters: "
            f"{expected:.4g} FLOPs per token without lookups; inference does {done:.4g}",
        )


def flops_are_estimated(tested: ModelUnderTest) -> None:
    """`flops_per_token` agrees within 10% with what a training step multiplies.

    Measured: the FLOPs of all matmuls and convolutions of forward and backward, counted by torch, on sequences of
    eight tokens and of max_seq_len. Where the file overrides nothing the default is only an estimate (it assumes full
    attention in every layer, and each weight used once): then only MoE models are judged.
    Causes: forward alone counted, or multiply and add as one; the output head or the multi-token modules forgotten; all
    experts counted instead of the active ones; attention counted for layers that have none.
    """
    model = tested.build().train()
    overridden = any(
        getattr(tested.Model, n) is not getattr(BaseModel, n)
        for n in ("flops_per_token", "attention_flops_per_token", "num_params")
    )
    with torch.no_grad():
        is_moe = "moe/load" in call(model, tested.tokens(), targets=tested.tokens())[2]
    total = sum(p.numel() for p in model.parameters())
    lengths = (8, tested.args.max_seq_len) if overridden else (8,)
    for length in lengths:
        ids = tested.tokens(batch_size=4, length=min(length, tested.args.max_seq_len))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call(model, ids, targets=next_tokens(ids))[1].backward()
        done = counter.get_total_flops() / ids.numel()
        expected = model.flops_per_token(ids.shape[1])
        require(expected > 0, f"flops_per_token gives {expected}")
        if not _near(expected, done):
            if not overridden and not is_moe:
                raise NotApplicable(
                    f"the default estimate is {expected / done:.2f} times the measured count: override "
                    "flops_per_token for a correct MFU"
                )
            all_experts = expected + 6 * (total - model.num_params()["active"])
            if is_moe and "flops_per_token" not in vars(tested.Model) and _near(all_experts, done):
                raise NotApplicable("every expert is computed for every token: flops_per_token counts the active ones")
            require(
                False,
                f"flops_per_token gives {expected:.4g} at {ids.shape[1]} tokens, a training step does "
                f"{done:.4g}: {expected / done:.2f} times",
            )


def _near(expected: float, done: float) -> bool:
    return 0.9 * done < expected < 1.1 * done


def _forward_flops(model: BaseModel, ids: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call(model, ids)
    return counter.get_total_flops()


def _lookups(model: BaseModel) -> int:
    """Return how many parameters are only looked up: tables of embeddings that are not the output head as well."""
    head = {id(p) for p in getattr(model, "lm_head", torch.nn.Module()).parameters()}
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    return sum(table.numel() for table in tables if id(table) not in head)
