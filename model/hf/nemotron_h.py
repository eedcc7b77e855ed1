"""Nemotron-H as transformers publishes it, and the config.json of NVIDIA's own code."""

import torch

from model.hf.config_keys import Key
from model.hf.layout import Layout
from model.hf.tensors import Join, Shape

MAMBA, ATTENTION, MOE, MLP = "linear_attention", "full_attention", "moe", "mlp"
LETTERS = {"M": MAMBA, "*": ATTENTION, "E": MOE, "-": MLP}
OLDER_NAMES = {"mamba": MAMBA, "attention": ATTENTION}
NO_TIME_STEP = 1e-9  # transformers takes the logarithm of time_step_min, for start values
FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "dim": "hidden_size",
    "n_layers": Key("layers_block_type", write=lambda n, args: args.kinds, read=lambda kinds, config: len(kinds)),
    "layer_types": Key("layers_block_type", write=lambda kinds, args: args.kinds),
    "mamba_n_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_state_dim": "ssm_state_size",
    "mamba_n_groups": "n_groups",
    "conv_size": "conv_kernel",
    "chunk_size": "chunk_size",
    "time_step_min": Key(
        "time_step_min",
        write=lambda step, args: max(step, NO_TIME_STEP),
        read=lambda step, config: step if step > NO_TIME_STEP else 0.0,
    ),
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "inter_dim": "intermediate_size",
    "n_routed_experts": "n_routed_experts",
    "n_activated_experts": "num_experts_per_tok",
    "moe_inter_dim": "moe_intermediate_size",
    "moe_latent_dim": Key("moe_latent_size", write=lambda width, args: width or None),
    "shared_inter_dim": "moe_shared_expert_intermediate_size",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "norm_topk": "norm_topk_prob",
    "route_scale": "routed_scaling_factor",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
NAMES = {
    "^tok_embed": "backbone.embeddings",
    "^norm": "backbone.norm_f",
    "^layers": "backbone.layers",
    ".mixer.(z|xbc|dt)_proj.": ".mixer.in_proj.",
    ".mixer.conv.": ".mixer.conv1d.",
    ".mixer.router$": ".mixer.gate.weight",
    ".mixer.routing_bias$": ".mixer.gate.e_score_correction_bias",
    ".mixer.(up|down)_proj$": r".mixer.experts.*.\1_proj.weight",
    ".mixer.shared.": ".mixer.shared_experts.",
    ".mixer.latent_in.": ".mixer.fc1_latent_proj.",
    ".mixer.latent_out.": ".mixer.fc2_latent_proj.",
}


def layout(args_class):
    """Return the Layout of a model whose arguments are an `args_class`."""
    return Layout(
        args=args_class,
        architecture="NemotronHForCausalLM",
        model_type="nemotron_h",
        fields=FIELDS,
        only_ours=("bias_update_speed", "seq_aux_alpha"),
        fixed={
            "mamba_hidden_act": "silu",
            "mlp_hidden_act": "relu2",
            "use_conv_bias": True,
            "use_bias": False,
            "mlp_bias": False,
        },
        absent={
            "time_step_min": 0.001,
            "n_routed_experts": 0,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 7688,
            "moe_latent_size": 0,
            "moe_shared_expert_intermediate_size": 7688,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "tie_word_embeddings": False,
        },
        canonical=canonical,
        names=names,
        joined=lambda args: {".mixer.in_proj.weight": Join(("z_proj", "xbc_proj", "dt_proj"))},
        stored=lambda args: {".conv.weight": Shape(-1, 1, args.conv_size)},
        copies=lambda args: {"lm_head.weight": "backbone.embeddings.weight"} if args.tie_embeddings else {},
        present=as_stored,
        ignored=("rotary_emb.inv_freq$", "^mtp."),
    )


def names(args):
    """Return {pattern of our names: published text}: the last projection of Mamba-2 has another name there."""
    mamba = [i for i, kind in enumerate(args.kinds) if kind == MAMBA]
    return NAMES | {f"layers.{i}.mixer.o_proj.": f"layers.{i}.mixer.out_proj." for i in mamba}


def canonical(config):
    """Return the config in the keys of transformers; NVIDIA's own code has a letter per block.

    There `time_step_min` is for start values, and nothing bounds a step in `forward`; transformers bounds it by this
    number (https://github.com/huggingface/transformers/pull/48989).
    """
    kinds, pattern = config.get("layers_block_type"), config.get("hybrid_override_pattern")
    if isinstance(kinds, list):
        return {**config, "layers_block_type": [OLDER_NAMES.get(kind, kind) for kind in kinds]}
    if not isinstance(pattern, str):
        return config
    kinds = [LETTERS.get(letter, letter) for letter in pattern]
    return {**config, "layers_block_type": kinds, "hybrid_override_pattern": None, "time_step_min": 0.0}


def as_stored(config, tensors):
    """Return the config of what the checkpoint holds: transformers has an output head of its own in any case."""
    embeddings, head = (tensors.get(name) for name in ("backbone.embeddings.weight", "lm_head.weight"))
    if not config.get("tie_word_embeddings") or head is None or embeddings is None or torch.equal(embeddings, head):
        return config
    return {**config, "tie_word_embeddings": False}
