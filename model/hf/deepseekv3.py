"""DeepSeek-V3 as transformers publishes it. The MTP modules are further layers there."""

from model.hf.layout import Layout
from model.hf.tensors import Rows, interleaved_rows

FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "norm_topk": "norm_topk_prob",
    "route_scale": "routed_scaling_factor",
    "n_mtp_layers": "num_nextn_predict_layers",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}


def layout(args_class):
    """Return the Layout of a model whose arguments are an `args_class`."""
    return Layout(
        args=args_class,
        architecture="DeepseekV3ForCausalLM",
        model_type="deepseek_v3",
        fields=FIELDS,
        only_ours=("bias_update_speed", "seq_aux_alpha", "mtp_loss_weight"),
        fixed={
            "hidden_act": "silu",
            "attention_bias": False,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "rope_interleave": True,
        },
        absent={
            "q_lora_rank": 0,
            "n_shared_experts": 0,
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
            "tie_word_embeddings": False,
        },
        names=names,
        more=lambda args: {"num_key_value_heads": args.n_heads, "q_lora_rank": args.q_lora_rank or None},
        present=without_missing_mtp,
        copies=copies,
        stored=stored,
    )


def names(args):
    """Return {pattern of our names: published text}."""
    names = {"^tok_embed": "model.embed_tokens", "^norm": "model.norm", "^layers": "model.layers"}
    for k, layer in enumerate(_mtp_layers(args)):
        names[f"^mtp.{k}.embed_norm"] = f"{layer}.enorm"
        names[f"^mtp.{k}.hidden_norm"] = f"{layer}.hnorm"
        names[f"^mtp.{k}.proj"] = f"{layer}.eh_proj"
        names[f"^mtp.{k}.norm"] = f"{layer}.shared_head.norm"
        names[f"^mtp.{k}.block"] = layer
    return names | {
        ".attn_norm.": ".input_layernorm.",
        ".attn.": ".self_attn.",
        ".ffn_norm.": ".post_attention_layernorm.",
        ".q_a_norm.": ".q_a_layernorm.",
        ".kv_a_norm.": ".kv_a_layernorm.",
        ".kv_a_proj.": ".kv_a_proj_with_mqa.",
        ".ffn.router": ".mlp.gate.weight",
        ".ffn.routing_bias": ".mlp.gate.e_score_correction_bias",
        ".ffn.shared.": ".mlp.shared_experts.",
        ".ffn.(gate|up|down)_proj$": r".mlp.experts.*.\1_proj.weight",
        ".ffn.": ".mlp.",
    }


def copies(args):
    """Each published MTP module repeats the embeddings and the output head."""
    head = "model.embed_tokens.weight" if args.tie_embeddings else "lm_head.weight"
    embeddings = {f"{layer}.embed_tokens.weight": "model.embed_tokens.weight" for layer in _mtp_layers(args)}
    return embeddings | {f"{layer}.shared_head.head.weight": head for layer in _mtp_layers(args)}


def stored(args):
    """The published rotary pairs are neighbours."""
    q = Rows(interleaved_rows(args.n_heads, args.qk_nope_head_dim, args.qk_rope_head_dim))
    kv = Rows(interleaved_rows(1, args.kv_lora_rank, args.qk_rope_head_dim))
    return {".q_proj.weight": q, ".q_b_proj.weight": q, ".kv_a_proj.weight": kv}


def without_missing_mtp(config, tensors):
    """Return the config of what the checkpoint holds: transformers writes none of the MTP modules that it announces."""
    if any(name.startswith(f"model.layers.{config.get('num_hidden_layers')}.") for name in tensors):
        return config
    return {**config, "num_nextn_predict_layers": 0}


def _mtp_layers(args):
    return [f"model.layers.{layer}" for layer in range(args.n_layers, args.n_layers + args.n_mtp_layers)]
