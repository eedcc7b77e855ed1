"""The models that tests run with: those that ship. A plugin that is dropped into model/ is none of them."""

import dataclasses

from model import get_model_and_args

BASE_MODEL = "mini_deepseekv3"  # of the small run that continues a text
CHAT_MODEL = "mini_llama3"  # of the small run that answers

MOE_CHECKS = {
    "moe.loads_are_counted",
    "moe.loads_leave_padding_out",
    "moe.loads_are_true",
    "moe.routers_have_a_task_gradient",
    "moe.bias_update_evens_the_load",
    "moe.bias_only_chooses",
    "moe.balance_loss_evens_the_load",
    "moe.experts_differ",
}
WINDOW_CHECK, SINK_CHECK = "parts.windows_count_the_token_itself", "parts.sinks_only_take"
INDEX_CHECK = "parts.index_loss_teaches_the_indexer_alone"
DRAFT_CHECK = "state.drafts_in_chunks_agree"  # of models with a draft
SUM_CHECK = "precision.recurrent_state_is_fp32"  # of models with a recurrence
STREAM_CHECK = "parts.sinkhorn_mixes_streams_evenly"
PART_CHECKS = {WINDOW_CHECK, SINK_CHECK, INDEX_CHECK, STREAM_CHECK}
EXPECTED_SKIPS = {  # {model: the checks that do not apply to it}; a model that ships gets a line here
    "mini_deepseekv3": {"contract.logits_are_those_of_the_loss", *PART_CHECKS, SUM_CHECK},
    "mini_deepseekv4": {"contract.logits_are_those_of_the_loss", DRAFT_CHECK, SUM_CHECK},
    "mini_lfm3": {
        "contract.logits_are_those_of_the_loss",
        *MOE_CHECKS,
        SINK_CHECK,
        INDEX_CHECK,
        STREAM_CHECK,
        DRAFT_CHECK,
        SUM_CHECK,
    },
    "mini_llama3": {"contract.logits_are_those_of_the_loss", *MOE_CHECKS, *PART_CHECKS, DRAFT_CHECK, SUM_CHECK},
    "mini_nemotron_h": {"contract.logits_are_those_of_the_loss", *PART_CHECKS, DRAFT_CHECK},
    "mini_qwen3_5": {
        "contract.logits_are_those_of_the_loss",
        "moe.bias_update_evens_the_load",
        "moe.bias_only_chooses",
        *PART_CHECKS,
    },
}
TEMPLATE_SKIPS = {  # the template has neither a state nor doc_ids nor experts
    "contract.logits_are_those_of_the_loss",
    "state.chunks_equal_full_forward",
    "state.long_sequences",
    "state.sequences_at_their_own_positions",
    "state.clone_is_independent",
    "state.rewound_tokens_leave_no_trace",
    "state.sequences_can_be_reordered",
    "state.forward_leaves_pos_alone",
    "state.memory_is_bounded",
    DRAFT_CHECK,
    SUM_CHECK,
    "packing.long_sequences",
    "packing.padding_changes_no_loss",
    "packing.packed_equals_separate",
    "packing.gradient_stays_in_the_document",
    "packing.packed_loss_equals_separate",
    "packing.losses_stay_in_the_document",
    *MOE_CHECKS,
    *PART_CHECKS,
}
SHIPPED = tuple(EXPECTED_SKIPS)
TINY = {
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "inter_dim": 48,
    "moe_inter_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_activated_experts": 2,
}


def sizes_of(name, sizes):
    """Return those of `sizes` that model `name` has; for a model with a `tiny()` of its own, what that sets."""
    ModelArgs = get_model_and_args(name)[1]
    tiny, default = ModelArgs.tiny(), ModelArgs()
    names = [f.name for f in dataclasses.fields(ModelArgs) if f.name not in ("vocab_size", "max_seq_len")]
    if tiny is None:
        return {field: sizes[field] for field in names if field in sizes}
    return {field: getattr(tiny, field) for field in names if getattr(tiny, field) != getattr(default, field)}
