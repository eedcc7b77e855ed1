"""Qwen3.5 as transformers publishes it: a class without experts and one with, alone or in a model that reads images."""

import math

from model.hf.config_keys import Key
from model.hf.layout import Layout, Variants
from model.hf.tensors import Join, Rows, Shape, alternating_blocks

FULL = "full_attention"
COMMON = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "layer_types": Key("layer_types", write=lambda types, args: args.mixers),
    "linear_n_k_heads": "linear_num_key_heads",
    "linear_n_v_heads": "linear_num_value_heads",
    "linear_k_head_dim": "linear_key_head_dim",
    "linear_v_head_dim": "linear_value_head_dim",
    "conv_size": "linear_conv_kernel_dim",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "qk_rope_head_dim": Key(
        "rope_parameters.partial_rotary_factor",
        write=lambda n_channels, args: share(n_channels, args.head_dim),
        read=lambda factor, config: int(config["head_dim"] * factor),
    ),
    "n_mtp_layers": "mtp_num_hidden_layers",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
DENSE = {"inter_dim": "intermediate_size", "n_routed_experts": "num_experts"}
EXPERTS = {
    "n_routed_experts": "num_experts",
    "n_activated_experts": "num_experts_per_tok",
    "moe_inter_dim": "moe_intermediate_size",
    "shared_inter_dim": "shared_expert_intermediate_size",
    "aux_loss_weight": "router_aux_loss_coef",
}
ONLY_OURS = ("chunk_size", "mtp_loss_weight")
ABSENT = {
    "layer_types": lambda config: tuple(
        FULL if (i + 1) % config.get("full_attention_interval", 4) == 0 else "linear_attention"
        for i in range(config["num_hidden_layers"])
    ),
    "rope_parameters.partial_rotary_factor": lambda config: int(
        config["head_dim"] * config.get("partial_rotary_factor", 0.25)
    ),
    "mtp_num_hidden_layers": 0,
    "tie_word_embeddings": False,
}


def layout(args_class):
    """Return the layouts of a model whose arguments are an `args_class`."""
    common = {
        "args": args_class,
        "names": names,
        "rope": "rope_parameters",
        "fixed": {"hidden_act": "silu", "attention_bias": False},
        "stored": lambda args: {".conv.weight": Shape(-1, 1, args.conv_size)},
        "joined": joined,
        "present": with_mtp,
        "canonical": text_config,
        "aliases": {"^model.language_model.": "model."},
        "ignored": ("rotary_emb.inv_freq$", "^model.visual."),
    }
    return Variants(
        Layout(
            **common,
            architecture="Qwen3_5ForCausalLM",
            model_type="qwen3_5_text",
            known_as=("Qwen3_5ForConditionalGeneration", "qwen3_5"),
            fields=COMMON | DENSE,
            only_ours=(*ONLY_OURS, *EXPERTS.keys() - DENSE.keys()),
            absent=ABSENT | {"num_experts": 0},
            holds=lambda args: args.n_routed_experts == 0,
        ),
        Layout(
            **common,
            architecture="Qwen3_5MoeForCausalLM",
            model_type="qwen3_5_moe_text",
            known_as=("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe"),
            fields=COMMON | EXPERTS,
            only_ours=(*ONLY_OURS, "inter_dim"),
            absent=ABSENT | {"router_aux_loss_coef": 0.001},
        ),
    )


def names(args):
    """Return {pattern of our names: published text}."""
    mixers = {
        f"^layers.{i}.attn.": f"model.layers.{i}.{'self_attn' if kind == FULL else 'linear_attn'}."
        for i, kind in enumerate(args.mixers)
    }
    return mixers | {
        "^tok_embed": "model.embed_tokens",
        "^norm": "model.norm",
        "^layers": "model.layers",
        "^mtp.embed_norm": "mtp.pre_fc_norm_embedding",
        "^mtp.hidden_norm": "mtp.pre_fc_norm_hidden",
        "^mtp.proj": "mtp.fc",
        "^mtp.block.attn.": "mtp.layers.0.self_attn.",
        "^mtp.block": "mtp.layers.0",
        ".attn_norm.": ".input_layernorm.",
        ".ffn_norm.": ".post_attention_layernorm.",
        ".self_attn.gate_proj.": ".self_attn.q_proj.",
        ".linear_attn.(qkv|z|a|b)_proj.": r".linear_attn.in_proj_\1.",
        ".linear_attn.conv.": ".linear_attn.conv1d.",
        ".linear_attn.o_proj.": ".linear_attn.out_proj.",
        ".ffn.router$": ".mlp.gate.weight",
        ".ffn.shared_gate$": ".mlp.shared_expert_gate.weight",
        ".ffn.shared.": ".mlp.shared_expert.",
        ".ffn.(gate|up|down)_proj$": r".mlp.experts.*.\1_proj.weight",
        ".ffn.": ".mlp.",
    }


def joined(args):
    """The published q_proj has the rows of a head's query and then those of its gate."""
    order = alternating_blocks(2, args.n_heads, args.head_dim)
    return {".self_attn.q_proj.weight": Join(("q_proj", "gate_proj"), then=(Rows(order),))}


def share(n_channels, head_dim):
    """Return the partial_rotary_factor whose product with `head_dim` is cut to `n_channels`."""
    factor = n_channels / head_dim
    return factor if int(head_dim * factor) == n_channels else math.nextafter(factor, 2)


def text_config(config):
    """Return the config of the text model; published checkpoints read images as well, and nest it."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    outer = {key: config[key] for key in ("tie_word_embeddings", "quantization_config") if key in config}
    return inner | outer


def with_mtp(config, tensors):
    """Return the config of what the checkpoint holds: transformers leaves the MTP module out."""
    return {**config, "mtp_num_hidden_layers": int(any(name.startswith("mtp.") for name in tensors))}
