"""LFM3 as transformers publishes it, with the names of the files; its own module calls the gate `g_proj`."""

from model.hf.config_keys import Key
from model.hf.layout import Layout
from model.hf.tensors import Shape

FULL = "rope_parameters.full_attention"
SLIDING = "rope_parameters.sliding_attention"
FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "layer_types": Key("layer_types", write=lambda types, args: args.kinds()),
    "conv_size": "conv_L_cache",
    "window_size": "sliding_window",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "inter_dim": "intermediate_size",
    "head_gate": "use_attention_gate",
    "sandwich_norm": "use_sandwich_norm",
    "norm_eps": "norm_eps",
    "rope_theta": f"{FULL}.rope_theta",
    "rope_proportion": f"{FULL}.partial_rotary_factor",
    "rope_local_theta": f"{SLIDING}.rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}
NAMES = {
    "^tok_embed": "model.embed_tokens",
    "^norm": "model.embedding_norm",
    "^layers": "model.layers",
    ".mixer_norm.": ".operator_norm.",
    ".mixer_post_norm.": ".post_operator_norm.",
    ".ffn_post_norm.": ".post_ffn_norm.",
    ".ffn.gate_proj.": ".feed_forward.w1.",
    ".ffn.up_proj.": ".feed_forward.w3.",
    ".ffn.down_proj.": ".feed_forward.w2.",
}


def layout(args_class):
    """Return the Layout of a model whose arguments are an `args_class`."""
    return Layout(
        args=args_class,
        architecture="Lfm3ForCausalLM",
        model_type="lfm3",
        fields=FIELDS,
        fixed={
            "attention_bias": False,
            "conv_bias": False,
            "rope_scaling": None,  # as the older form of `rope_parameters` it would replace both
            f"{FULL}.rope_type": "proportional",
            f"{SLIDING}.rope_type": "default",
        },
        absent={"tie_word_embeddings": True, "layer_types": ()},
        names=names,
        stored=lambda args: {".conv.weight": Shape(-1, 1, args.conv_size)},
        more=lambda args: {"pad_token_id": None},  # transformers' default lies outside of a small vocabulary
    )


def names(args):
    """Return {pattern of our names: published text}: our `mixer` is their `conv` or `self_attn`."""
    mixers = {}
    for layer, kind in enumerate(args.kinds()):
        mixers[f"layers.{layer}.mixer."] = f"layers.{layer}.{'conv' if kind == 'conv' else 'self_attn'}."
    return NAMES | mixers | {".conv.o_proj.": ".conv.out_proj."}
