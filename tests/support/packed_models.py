"""Small models whose packed sequences are long enough for flex_attention, and a counter of compiled operators."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model import get_model_and_args

SIZES = {  # heads that are no power of two, grouped, and values narrower than keys
    "mini_llama3": dict(n_heads=4, n_kv_heads=2, head_dim=24),
    "mini_deepseekv3": dict(
        n_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        moe_inter_dim=32,
        n_routed_experts=4,
        n_activated_experts=2,
    ),
}
TOKENS = 300  # three blocks, the last one not full; one less in the module that predicts further


def small_model(name, **changes):
    Model, ModelArgs = get_model_and_args(name)
    torch.manual_seed(0)
    sizes = {"dim": 64, "n_layers": 2, "inter_dim": 64, "vocab_size": 64, "max_seq_len": 512, **SIZES[name], **changes}
    return Model(ModelArgs(**sizes))


def packed_batch(seed, batch_size=3, tokens=TOKENS):
    """Documents of about fifty tokens; the second sequence ends in padding, a document of its own."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (batch_size, tokens), generator=generator)
    doc_ids = (torch.rand(batch_size, tokens, generator=generator) < 0.02).cumsum(dim=1)
    doc_ids[1, -50:] = -1
    return {"input_ids": ids, "targets": ids.roll(-1, 1).masked_fill(doc_ids < 0, -100), "doc_ids": doc_ids}


def counter(backend):
    """A backend for torch.compile; `flex_calls` of it is the number of flex_attention calls compiled."""
    return CompileCounterWithBackend(backend)


def flex_calls(compiled):
    return sum(
        "flex_attention" in str(node.target)
        for graph in compiled.graphs
        for node in graph.graph.nodes
        if node.op == "call_function"
    )
