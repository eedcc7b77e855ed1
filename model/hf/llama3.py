"""Llama 3 as transformers publishes it."""

from model.hf.layout import Layout
from utils.errors import ModelError

FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "inter_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
NAMES = {
    "^tok_embed": "model.embed_tokens",
    "^norm": "model.norm",
    "^layers": "model.layers",
    ".attn_norm.": ".input_layernorm.",
    ".attn.": ".self_attn.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".ffn.": ".mlp.",
}


def layout(args_class):
    """Return the Layout of a model whose arguments are an `args_class`."""
    return Layout(
        args=args_class,
        architecture="LlamaForCausalLM",
        model_type="llama",
        fields=FIELDS,
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        absent={
            "num_key_value_heads": lambda config: config["num_attention_heads"],
            "head_dim": lambda config: config["hidden_size"] // max(1, config["num_attention_heads"]),
            "tie_word_embeddings": False,
        },
        names=lambda args: NAMES,
        more=no_more,
    )


def no_more(args):
    """Nothing more for config.json; ModelError for sizes that transformers refuses."""
    if args.dim % args.n_heads:
        raise ModelError(f"transformers requires dim={args.dim} to be a multiple of n_heads={args.n_heads}: change one")
    return {}
