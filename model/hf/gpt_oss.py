"""gpt-oss as transformers publishes it: experts in stacks, transposed, the columns of gate and up in turn."""

from model.hf.config_keys import Key
from model.hf.layout import Layout
from model.hf.tensors import Join, Rows, Transposed, alternating_blocks

FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "layer_types": Key("layer_types", write=lambda types, args: args.kinds()),
    "window_size": "sliding_window",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "moe_inter_dim": "intermediate_size",
    "n_routed_experts": "num_local_experts",
    "n_activated_experts": "num_experts_per_tok",
    "swiglu_alpha": "swiglu_alpha",
    "swiglu_limit": "swiglu_limit",
    "aux_loss_weight": "router_aux_loss_coef",
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
    ".ffn.router$": ".mlp.router.weight",
    ".ffn.router_bias$": ".mlp.router.bias",
    ".ffn.(gate|up)_proj$": ".mlp.experts.gate_up_proj",
    ".ffn.(gate|up)_bias$": ".mlp.experts.gate_up_proj_bias",
    ".ffn.down_proj$": ".mlp.experts.down_proj",
    ".ffn.down_bias$": ".mlp.experts.down_proj_bias",
}


def layout(args_class):
    """Return the Layout of a model whose arguments are an `args_class`."""
    return Layout(
        args=args_class,
        architecture="GptOssForCausalLM",
        model_type="gpt_oss",
        fields=FIELDS,
        fixed={"hidden_act": "silu", "attention_bias": True, "attention_dropout": 0.0},
        absent={
            "layer_types": (),
            "sliding_window": 128,
            "num_key_value_heads": lambda config: config["num_attention_heads"],
            "head_dim": 64,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "router_aux_loss_coef": 0.001,
            "tie_word_embeddings": False,
            "rope_theta": 150000.0,
        },
        rope="rope_parameters",  # without it transformers assumes YaRN
        names=lambda args: NAMES,
        stored=lambda args: {".ffn.down_proj": Transposed()},
        joined=joined,
    )


def joined(args):
    """Gate and up are one tensor, with a column of each in turn."""
    in_turn = Rows(alternating_blocks(2, args.moe_inter_dim), dim=1)
    return {
        ".gate_up_proj": Join(("gate_proj", "up_proj"), dim=1, then=(in_turn, Transposed())),
        ".gate_up_proj_bias": Join(("gate_bias", "up_bias"), dim=1, then=(in_turn,)),
    }
