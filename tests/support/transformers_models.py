"""Random sizes of Llama 3 and DeepSeek-V3, and the multi-token prediction modules of transformers."""

import random

import torch

from checks import ModelUnderTest
from model.deepseekv3 import DeepSeekV3Model
from model.llama3 import Llama3Model
from tests.support import same_as_transformers

LLAMA, DEEPSEEK = Llama3Model.model_name, DeepSeekV3Model.model_name
SEEDS = range(12)
MAX_SEQ_LEN = 40
NO_SHARED = (3, 6)


def random_args(name: str, seed: int, **changes):
    """Sizes that share no factor by design; every switch takes each of its values over SEEDS."""
    r = random.Random(f"{name} {seed}")
    heads = r.choice([2, 3, 4, 6])
    fields = {
        "vocab_size": r.randrange(53, 131),
        "max_seq_len": MAX_SEQ_LEN,
        "n_layers": r.choice([2, 3]),
        "n_heads": heads,
        "dim": heads * r.randrange(5, 12),
        "inter_dim": r.randrange(31, 67),
        "norm_eps": (1e-5, 1e-6)[seed % 2],
        "rope_theta": r.choice([10000.0, 5e5, 1234.5]),
        "tie_embeddings": seed % 2 == 0,
        **random_rope(r, ("default", "llama3", "yarn")[seed % 3]),
    }
    if name == LLAMA:
        fields |= {
            "n_kv_heads": r.choice([g for g in (1, 2, 3, 4, 6) if heads % g == 0]),
            "head_dim": r.choice([4, 6, 10, 14]),
        }
    else:
        groups, limited = [(1, 1), (2, 1), (3, 2), (4, 4), (4, 2), (1, 1)][seed % 6]
        experts = groups * r.choice([2, 3]) if groups > 1 else r.choice([5, 7])
        dense = (0, 1, fields["n_layers"])[(seed // 2) % 3]
        fields |= {
            "q_lora_rank": (0, 13, 17)[(seed // 4) % 3],
            "kv_lora_rank": r.choice([9, 12, 19]),
            "qk_nope_head_dim": r.choice([5, 6, 9]),
            "qk_rope_head_dim": r.choice([4, 6, 10]),
            "v_head_dim": r.choice([3, 7, 12, 21]),
            "moe_inter_dim": r.randrange(11, 29),
            "n_dense_layers": dense,
            "n_routed_experts": experts,
            "n_shared_experts": 0 if seed in NO_SHARED else r.choice([1, 2]),
            "n_activated_experts": r.randrange(1, experts // groups * limited + 1),
            "n_expert_groups": groups,
            "n_limited_groups": limited,
            "norm_topk": (seed // 2) % 2 == 0,
            "route_scale": (1.0, 2.5, 0.7)[(seed // 2) % 3],
            # transformers has no MTP module without experts, and none without shared ones
            "n_mtp_layers": 0 if dense == fields["n_layers"] or seed in NO_SHARED else seed % 3,
            "seq_aux_alpha": 0.0,
            "mtp_loss_weight": 0.3,
        }
    return ModelUnderTest(name).ModelArgs(**fields | changes)


def random_rope(r, kind: str) -> dict:
    if kind == "default":
        return {}
    fields = {
        "rope_type": kind,
        "rope_factor": r.choice([2.0, 8.0, 40.0]),
        "rope_original_max_seq_len": r.choice([8, 16, 20]),
    }
    if kind == "llama3":
        return fields | {"rope_low_freq_factor": r.choice([0.5, 1.0]), "rope_high_freq_factor": r.choice([2.0, 4.0])}
    fields |= r.choice(
        [
            {"rope_mscale": 1.0, "rope_mscale_all_dim": 1.0},
            {"rope_mscale_all_dim": 0.8},
            {"rope_mscale": 0.707, "rope_mscale_all_dim": 0.9},
            {},
        ]
    )
    return fields | {"rope_beta_fast": r.choice([4.0, 32.0]), "rope_beta_slow": r.choice([0.5, 1.0])}


def load(folder):
    """The reference; and, where the checkpoint has MTP modules, transformers' model of them, else None."""
    reference = same_as_transformers.load(folder)
    n = getattr(reference.config, "num_nextn_predict_layers", 0)
    if not n:
        return reference, None
    from transformers.modeling_layers import MtpModel

    find_mtp(reference)
    return reference, MtpModel.from_pretrained(reference)


def find_mtp(reference):
    """transformers looks for MTP modules in layer 61 only, the place they have in the model of 671B parameters."""
    first = reference.config.num_hidden_layers
    reference._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{first + k}\." for k in range(reference.config.num_nextn_predict_layers)
    ]


def reference_loss(reference, mtp, ids, labels, weight):
    """The mean cross-entropy of the next token, plus `weight` times the mean over the MTP modules of theirs.

    As equation 24 has it, every module's sum is divided by the targets of the full sequence.
    """
    out = reference(ids, labels=labels, output_hidden_states=True)
    if mtp is None:
        return out.loss
    hidden, losses = out.hidden_states[-1], []
    for k in range(len(mtp.layers)):
        positions = torch.arange(k + 1, ids.shape[1])[None]
        hidden = mtp.forward_layer(k, hidden[:, :-1], positions, None, input_ids=ids[:, k + 1 :])
        logits = mtp.shared_head(hidden)[:, :-1]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, k + 2 :].flatten(), reduction="sum")
        losses.append(total / (labels[:, 1:] != -100).sum())
    return out.loss + weight * sum(losses) / len(losses)


def reference_gradients(reference, mtp):
    """{published name: gradient} of transformers' models, the MTP modules as further layers."""
    first, gradients = reference.config.num_hidden_layers, same_as_transformers.their_gradients(reference)
    for name, param in mtp.named_parameters() if mtp is not None else ():
        if not name.startswith("layers.") or not param.numel():
            continue
        _, k, rest = name.split(".", 2)
        rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        module, _, last = f"model.layers.{first + int(k)}.{rest}".rpartition(".")
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        if module.endswith(".experts"):
            for proj, stack in zip(*split_experts(last, grad), strict=True):
                gradients |= {f"{module}.{e}.{proj}.weight": part for e, part in enumerate(stack)}
        else:
            gradients[f"{module}.{last}"] = grad
    return gradients


def split_experts(name: str, stack):
    """transformers' tensors of all experts as (names, tensors) of the published projections."""
    if name == "gate_up_proj":
        return ("gate_proj", "up_proj"), stack.chunk(2, dim=1)
    return ("down_proj",), (stack,)
