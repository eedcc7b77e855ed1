"""DeepSeek-V4 as transformers publishes it.

Half of the published names are those of DeepSeek's own files (attn.wq_a), the others transformers' (model.norm). A head
has its rotary pairs last there, neighbours, and first here, in halves; so rows and columns of all that makes, norms or
reads heads are in another order.
"""

import math

import torch

from model.hf.config_keys import Key
from model.hf.layout import Layout
from model.hf.tensors import Join, Rows, Shape, Transposed

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
RATIOS = {0: SLIDING, 4: CSA, 128: HCA}  # of compress_ratios in DeepSeek's own config.json
FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "q_lora_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "window_size": "sliding_window",
    "csa_ratio": f"compress_rates.{CSA}",
    "hca_ratio": f"compress_rates.{HCA}",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "hc_mult": "hc_mult",
    "hc_iters": "hc_sinkhorn_iters",
    "hc_eps": "hc_eps",
    "moe_inter_dim": "moe_intermediate_size",
    "n_routed_experts": "n_routed_experts",
    "n_activated_experts": "num_experts_per_tok",
    "route_scale": "routed_scaling_factor",
    "swiglu_limit": "swiglu_limit",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_parameters.main.rope_theta",
    "compress_rope_theta": "rope_parameters.compress.rope_theta",
    "tie_embeddings": "tie_word_embeddings",
    "n_hash_layers": Key(
        "mlp_layer_types", write=lambda n, args: mlp_kinds(n, args.n_layers), read=lambda kinds, _: n_hash(kinds)
    ),
    "qk_rope_head_dim": Key(
        "rope_parameters.main.partial_rotary_factor",
        "rope_parameters.compress.partial_rotary_factor",
        "partial_rotary_factor",
        write=lambda n, args: share(n, args.head_dim),
        read=lambda part, config: int(config["head_dim"] * part),
    ),
}
NAMES = {
    "^tok_embed": "model.embed_tokens",
    "^lm_head": "head",
    "^norm": "model.norm",
    "^layers": "model.layers",
    "^hc_head.proj$": "model.hc_head.hc_fn",
    "^hc_head.bias$": "model.hc_head.hc_base",
    "^hc_head.scale$": "model.hc_head.hc_scale",
    ".(attn|ffn)_hc.(pre|post|res).proj$": r".hc_\1_fn",
    ".(attn|ffn)_hc.(pre|post|res).bias$": r".hc_\1_base",
    ".(attn|ffn)_hc.(pre|post|res).scale$": r".hc_\1_scale",
    ".attn.kv_norm.": ".attn.norm.",
    ".q_a_proj.": ".wq_a.",
    ".q_a_norm.": ".q_norm.",
    ".q_b_proj.": ".wq_b.",
    ".indexer.q_proj.": ".indexer.wq_b.",
    ".indexer.weight_proj.": ".indexer.weights_proj.",
    ".kv_proj.": ".wkv.",
    ".compressor.gate_proj.": ".compressor.wgate.",
    ".compressor.position_bias$": ".compressor.ape",
    ".attn.sinks$": ".attn.attn_sink",
    ".attn.o_a_proj$": ".attn.wo_a.weight",
    ".attn.o_proj.": ".attn.wo_b.",
    ".ffn.router$": ".ffn.gate.weight",
    ".ffn.routing_bias$": ".ffn.gate.bias",
    ".ffn.table$": ".ffn.gate.tid2eid",
    ".ffn.shared.gate_proj.": ".ffn.shared_experts.w1.",
    ".ffn.shared.down_proj.": ".ffn.shared_experts.w2.",
    ".ffn.shared.up_proj.": ".ffn.shared_experts.w3.",
    ".ffn.gate_proj$": ".ffn.experts.*.w1.weight",
    ".ffn.down_proj$": ".ffn.experts.*.w2.weight",
    ".ffn.up_proj$": ".ffn.experts.*.w3.weight",
}
ALIASES = {  # DeepSeek's own files
    "^embed.": "model.embed_tokens.",
    "^norm.": "model.norm.",
    "^hc_head_": "model.hc_head.hc_",
    "^layers.": "model.layers.",
    ".attn.kv_norm.": ".attn.norm.",
}


def layout(args_class):
    """Return the Layout of a model whose arguments are an `args_class`."""
    kinds = Key(
        "layer_types",
        write=lambda _, args: args.kinds(),
        read=lambda kinds, config: own_kinds(args_class, kinds),
    )
    return Layout(
        args=args_class,
        architecture="DeepseekV4ForCausalLM",
        model_type="deepseek_v4",
        fields=FIELDS | {"layer_types": kinds},
        only_ours=("index_loss_weight", "bias_update_speed", "seq_aux_alpha"),
        fixed={
            "hidden_act": "silu",
            "attention_bias": False,
            "scoring_func": "sqrtsoftplus",
            "norm_topk_prob": True,
            "num_key_value_heads": 1,
            "n_shared_experts": 1,
            "rope_parameters.main.rope_type": "default",
        },
        absent={"tie_word_embeddings": False},
        rope="rope_parameters.compress",
        names=lambda args: NAMES,
        stored=stored,
        joined=joined,
        canonical=canonical,
        more=more,
        aliases=ALIASES,
        ignored=("rotary_emb.inv_freq$", "^(model.)?mtp."),
        vocab_rows=("tok_embed.weight", "lm_head.weight", "ffn.table"),
    )


def share(n, of):
    """Return the fraction n / of, so that of times it is not below n, which transformers rounds down."""
    part = n / of
    return part if int(of * part) == n else math.nextafter(part, 1.0)


def mlp_kinds(n_hash_layers, n_layers):
    """Return the kinds of the MoE layers: those that choose experts by a table, then those with a router."""
    return ["hash_moe" if layer < n_hash_layers else "moe" for layer in range(n_layers)]


def n_hash(kinds):
    """Return how many layers choose experts by a table; ValueError unless they are the first."""
    n = kinds.count("hash_moe")
    if kinds != mlp_kinds(n, len(kinds)):
        raise ValueError
    return n


def own_kinds(args_class, kinds):
    """Return the kinds of attention as an argument: empty where they are the usual ones for so many layers."""
    usual = args_class(n_layers=len(kinds)).kinds()
    return () if tuple(kinds) == usual else tuple(kinds)


def canonical(config):
    """Return a config.json in the keys that transformers writes, where it has those of DeepSeek's own files."""
    config = dict(config)
    n_layers, rope = config.get("num_hidden_layers"), config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(n_layers, int) or not isinstance(rope, dict):
        return config  # refused later on
    ratios, n_hash_layers = config.pop("compress_ratios", None), config.pop("num_hash_layers", None)
    rope_dim = config.pop("qk_rope_head_dim", None)
    if config.get("layer_types") is None and ratios is not None:
        config["layer_types"] = [RATIOS.get(ratio, ratio) for ratio in ratios[:n_layers]]
    if config.get("layer_types") is None:
        config["layer_types"] = [CSA if i > 2 and i % 2 else HCA for i in range(n_layers)]
    if config.get("mlp_layer_types") is None:
        config["mlp_layer_types"] = mlp_kinds(3 if n_hash_layers is None else n_hash_layers, n_layers)
    rates = config.get("compress_rates") or {CSA: 4, HCA: 128}
    legacy = {CSA: config.pop("compress_rate_csa", None), HCA: config.pop("compress_rate_hca", None)}
    config["compress_rates"] = {**rates, **{kind: rate for kind, rate in legacy.items() if rate is not None}}
    part = config.pop("partial_rotary_factor", None)
    if part is None:
        part = 64 / 512 if rope_dim is None else rope_dim / config.get("head_dim", 512)
    main_theta, entry_theta = config.pop("rope_theta", 10000.0), config.pop("compress_rope_theta", 160000.0)
    config.pop("rope_scaling", None)
    if not {"main", "compress"} <= rope.keys():
        rope = {key: value for key, value in rope.items() if key not in ("main", "compress", "rope_theta")}
        if (rope.get("rope_type") or rope.get("type")) == "yarn":
            rope.setdefault("attention_factor", 1.0)
        main = {"rope_type": "default", "rope_theta": main_theta, "partial_rotary_factor": part}
        rope = {"main": main, "compress": {**rope, "rope_theta": entry_theta, "partial_rotary_factor": part}}
    return config | {"rope_parameters": rope}


def more(args):
    """No multi-token prediction; YaRN leaves cos and sin as they are."""
    yarn = {"rope_parameters.compress.attention_factor": 1.0} if args.rope_type == "yarn" else {}
    return {"num_nextn_predict_layers": 0, **yarn}


def joined(args):
    """Return the tensors that are several of ours: the coefficients of a hyper-connection."""
    names = [f".hc_{sublayer}_{name}" for sublayer in ("attn", "ffn") for name in ("fn", "base", "scale")]
    return dict.fromkeys(names, Join(("pre", "post", "res")))


def stored(args):
    """Return the order of rows and columns, and the shapes, of what makes, norms or reads heads."""
    rope, width, index = args.qk_rope_head_dim, args.head_dim, args.index_head_dim
    group = args.n_heads // args.o_groups
    changed = {
        ".attn.q_b_proj.weight": Rows(heads(args.n_heads, width, rope)),
        ".attn.kv_proj.weight": Rows(heads(1, width, rope)),
        ".attn.kv_norm.weight": Rows(heads(1, width, rope)),
        ".attn.o_a_proj": (
            Rows(heads(group, width, rope), dim=2),
            Shape(args.o_groups * args.o_lora_rank, group * width),
        ),
        ".attn.indexer.q_proj.weight": Rows(heads(args.index_n_heads, index, rope)),
    }
    for layer, kind in enumerate(args.kinds()):
        if kind == CSA:
            changed |= compressor(f"layers.{layer}.attn.indexer.compressor", 2, index, rope, args.csa_ratio)
            changed |= compressor(f"layers.{layer}.attn.compressor", 2, width, rope, args.csa_ratio)
        if kind == HCA:
            changed |= compressor(f"layers.{layer}.attn.compressor", 1, width, rope, args.hca_ratio)
    return changed


def compressor(name, n_values, width, rope, ratio):
    """Return the same for a compressor with `n_values` values per token."""
    rows = Rows(heads(n_values, width, rope))
    columns = Rows(heads(1, width, rope), dim=1)
    bias = columns, Shape(n_values, ratio, width), Transposed(0, 1), Shape(ratio, n_values * width)
    return {
        f"{name}.kv_proj.weight": rows,
        f"{name}.gate_proj.weight": rows,
        f"{name}.norm.weight": Rows(heads(1, width, rope)),
        f"{name}.position_bias": bias,
    }


def heads(n_heads, width, rope):
    """Return the order of the rows of heads, theirs = ours[order]: ours begin with the rotary pairs, in halves."""
    pairs = torch.arange(rope).view(2, -1).T.flatten()  # neighbours
    head = torch.cat((torch.arange(rope, width), pairs))
    return (torch.arange(n_heads)[:, None] * width + head).flatten()
