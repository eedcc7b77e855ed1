"""Small args for any args dataclass, so that its model runs in milliseconds.

The author may define them (`ModelArgs.tiny()`); otherwise the usual field names get small values, as many of them as
the class accepts.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from model.basemodel import BaseModel, BaseModelArgs

# Uneven where a mix-up of two sizes should show. A value is only ever lowered: what the author switched off (0, None)
# or set to one stays as it is.
LAYERS = dict.fromkeys(("n_layers", "n_layer", "num_layers", "num_hidden_layers", "depth", "n_blocks"), 3)
EXPERTS = ("n_routed_experts", "n_experts", "num_experts", "num_local_experts")
ACTIVE_EXPERTS = ("n_activated_experts", "n_active_experts", "num_experts_per_tok", "n_experts_per_tok", "top_k")
SMALL = {
    "vocab_size": 97, "max_seq_len": 24, **LAYERS,
    **dict.fromkeys(("dim", "d_model", "n_embd", "hidden_size", "embed_dim", "model_dim", "width"), 32),
    **dict.fromkeys(("n_heads", "n_head", "num_heads", "num_attention_heads", "heads"), 4),
    **dict.fromkeys(("n_kv_heads", "n_kv_head", "num_kv_heads", "num_key_value_heads", "kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "head_size", "key_dim"), 8),
    **dict.fromkeys(("inter_dim", "intermediate_size", "ffn_dim", "d_ff", "ff_dim", "mlp_dim", "hidden_dim"), 48),
    "n_dense_layers": 1, "moe_inter_dim": 20, "moe_intermediate_size": 20, "expert_dim": 20,
    "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6,
    **dict.fromkeys(EXPERTS, 6),
    **dict.fromkeys(ACTIVE_EXPERTS, 2),
    "n_shared_experts": 1, "n_expert_groups": 3, "n_limited_groups": 2,
    **dict.fromkeys(("window_size", "sliding_window", "window", "chunk_size"), 8),
    **dict.fromkeys(("conv_size", "d_conv", "conv_kernel", "kernel_size"), 3), "linear_n_k_heads": 2,
    "linear_n_v_heads": 4, "linear_head_dim": 8, "linear_k_head_dim": 8, "linear_v_head_dim": 8, "state_dim": 8,
    "index_topk": 3, "index_head_dim": 8, "csa_ratio": 2, "hca_ratio": 3, "compress_ratio": 3, "hc_mult": 2,
    "d_state": 8, "state_size": 8, "block_size": 24, "n_ctx": 24, "context_length": 24, "max_position_embeddings": 24,
}  # fmt: skip
RAISED = ("n_expert_groups", "n_limited_groups")  # one group, the usual default, would leave their choice untried


def tiny_args(
    Model: type[BaseModel], ModelArgs: type[BaseModelArgs], switches: dict | None = None
) -> tuple[BaseModelArgs, str]:
    """Return (args, warning): small args that `Model` builds and runs with; the warning is "" or names what stayed big.

    switches: values to keep from a real run. Raises the author's own error when no size works.
    """
    tiny = ModelArgs.tiny()
    if tiny is not None:
        return tiny, ""
    switches = dict(switches or {})
    small = small_values(ModelArgs)
    try:
        args = ModelArgs(**small | switches)
        _try(Model, args)
        return args, ""
    except Exception as error:
        first_error = error
    kept = _largest_that_works(Model, ModelArgs, small, switches)
    if kept is None:
        raise first_error
    left = [name for name in small if name not in kept]
    return ModelArgs(**kept | switches), (
        f"{', '.join(left)} cannot be made small together with the rest ({type(first_error).__name__}: "
        f"{first_error}), so the checks take longer: give {ModelArgs.__name__} a classmethod tiny()"
    )


def small_values(ModelArgs: type) -> dict[str, Any]:
    """Return {name: small value} for the fields of `ModelArgs` that have one of the usual names."""
    default = ModelArgs()
    out = {}
    for field in dataclasses.fields(ModelArgs):
        value = getattr(default, field.name)
        small = SMALL.get(field.name)
        if field.init and small is not None and isinstance(value, int) and not isinstance(value, bool):
            if value > small or field.name in RAISED and value:
                out[field.name] = small
    return out | _fewer_layer_types(default, out)


def _fewer_layer_types(default: BaseModelArgs, small: dict[str, Any]) -> dict[str, Any]:
    """A list with one entry per layer is cut to a few entries that still hold every kind."""
    depth = next((getattr(default, name) for name in LAYERS if hasattr(default, name)), 0)
    out: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        given = field.default is not None and field.init
        if given and isinstance(value, (list, tuple)) and 0 < len(value) == depth:
            kinds = list(dict.fromkeys(map(repr, value)))
            chosen = sorted(next(i for i, v in enumerate(value) if repr(v) == kind) for kind in kinds)
            chosen = sorted([*chosen, *[i for i in range(depth) if i not in chosen][: max(0, 3 - len(chosen))]])
            out[field.name] = type(value)(value[i] for i in chosen)
            out |= {name: len(chosen) for name in LAYERS if hasattr(default, name)}
    return out


def _largest_that_works(Model: type[BaseModel], ModelArgs: type, small: dict, switches: dict) -> dict[str, Any] | None:
    """Return as many of the `small` values as work together, taken one after another; None when nothing works."""
    depth = [name for name in small if name in LAYERS or isinstance(small[name], (list, tuple))]
    sizes = ["vocab_size", "max_seq_len"]
    start = next((k for k in ([*sizes, *depth], sizes, []) if _works(Model, ModelArgs, small, k, switches)), None)
    if start is None:
        return None
    for name in small:
        if name not in start and _works(Model, ModelArgs, small, [*start, name], switches):
            start = [*start, name]
    return {name: small[name] for name in start if name in small}


def _works(Model: type[BaseModel], ModelArgs: type, small: dict, names: Iterable[str], switches: dict) -> bool:
    try:
        _try(Model, ModelArgs(**{name: small[name] for name in names if name in small} | switches))
        return True
    except Exception:
        return False


@torch.no_grad()
def _try(Model: type[BaseModel], args: BaseModelArgs) -> None:
    Model(args).eval()(torch.zeros(2, 5, dtype=torch.long))
