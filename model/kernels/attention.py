"""Which form of attention runs: FlexAttention, blocks of queries on a CPU, one query on a CPU, or PyTorch's own.

Shapes: B batch, T queries, S keys, H heads, G kv heads, K head dim.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from model.kernels.cpu_attention import LONGEST, blocked_attention
from model.kernels.decode import can_attend, in_use, one_query_attention, visible_keys
from model.kernels.matmul import faster_matmul
from model.kernels.precision import compute_dtype

FLEX_BLOCK = 128  # tokens; the compiler fails on the mask of a sequence of one block, and there is nothing to skip
FUSED_STEP = 8  # the fused kernels want heads of a multiple of so many channels
NARROWEST_FLEX_HEAD = 16  # elements; the least that Triton multiplies
WITH_LARGE_SHARED_MEMORY = (8, 0), (9, 0), (10, 0), (10, 3)  # CUDA capabilities: A100, H100 and H200, B200, B300


def faster_attention(plain, q, k, v, mask=None, scale=None):
    """Choose a form by the device, the dtypes and the sizes."""
    if isinstance(mask, PackedMask):
        if heads_fit_flex(q, v):
            return _flex_attention(q, k, v, mask.blocks, scale)
        mask = mask.dense
    on_cpu = q.device.type == "cpu"
    # The number of keys comes last: a compiled decode step would be recompiled where it passes LONGEST.
    if torch.is_grad_enabled() and on_cpu and q.dtype in (torch.bfloat16, torch.float32) and k.shape[1] <= LONGEST:
        return blocked_attention(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    if q.shape[1] == 1 and mask is not None and on_cpu:
        one_query = one_query_attention if can_attend(q, k, v) else grouped_one_query_attention
        return one_query(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    return plain(q, k, v, mask, scale)


def faster_sink_attention(plain, q, k, v, sink, mask=None, scale=None):
    """Choose a form as `faster_attention` does; the C++ kernel of one query knows of no sink."""
    if isinstance(mask, PackedMask):
        if heads_fit_flex(q, v):
            return _flex_attention(q, k, v, mask.blocks, scale, sink)
        mask = mask.dense
    on_cpu = q.device.type == "cpu"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_grad_enabled() and on_cpu and q.dtype in (torch.bfloat16, torch.float32) and k.shape[1] <= LONGEST:
        return blocked_attention(q, k, v, mask, scale, sink)
    if q.shape[1] == 1 and mask is not None and on_cpu:
        return grouped_one_query_attention(q, k, v, mask, scale, sink)
    return _fused_sink_attention(q, k, v, sink, mask, scale)


def _fused_sink_attention(q, k, v, sink, mask, scale):
    """PyTorch's fused kernels, which know of no sink: it is one more key, and its score is in a further channel."""
    if mask is None:
        mask = torch.ones(1, 1, q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    score = (sink / scale).to(q.dtype)[:, None].expand(*q.shape[:-1], 1)
    sink_key = F.pad(torch.zeros_like(k[:, :1]), (0, 1), value=1.0)
    q = torch.cat((q, score), dim=-1)
    k = torch.cat((F.pad(k, (0, 1)), sink_key), dim=1)
    v_dim = v.shape[-1]
    width = -(-max(q.shape[-1], v_dim) // FUSED_STEP) * FUSED_STEP
    q, k, v = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (q, k, F.pad(v, (0, 0, 0, 0, 0, 1))))
    mask = F.pad(mask, (0, 1), value=True)
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)[..., :v_dim].to(q.dtype)


def faster_attention_mask(plain, positions, state=None, doc_ids=None):
    """In a compiled decode step one operator, so that the compiler does not compare in every layer."""
    if state is not None and doc_ids is None and state.max_pos > 0:
        if positions.dtype == torch.int64 and in_use(positions):
            return visible_keys(positions, state.max_pos + positions.shape[1])
    return plain(positions, state, doc_ids)


def grouped_one_query_attention(q, k, v, mask, scale, sink=None):
    """Attention of one query per sequence. q (B, 1, H, K), k (B, S, G, K), v (B, S, G, Kv) -> (B, 1, H, Kv).

    PyTorch's fused CPU kernel works on blocks of queries, and is slow with one. sink (H,): as in `sink_attention`.
    """
    q = q[:, 0].unflatten(1, (k.shape[2], -1))  # (B, G, H / G, K)
    k = k.transpose(1, 2)  # (B, G, S, K)
    v = v.transpose(1, 2)
    scores = faster_matmul(torch.matmul, q, k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    largest = scores.amax(dim=-1, keepdim=True)
    if sink is not None:
        sink = sink.to(scores.dtype).view(k.shape[1], -1, 1)  # (G, H / G, 1)
        largest = torch.maximum(largest, sink)
    weights = (scores - largest).exp()
    total = weights.sum(dim=-1, keepdim=True)
    if sink is not None:
        total = total + (sink - largest).exp()
    # Softmax, but compiled its division would be repeated for every element of v that a weight meets.
    probs = weights * total.reciprocal()
    return faster_matmul(torch.matmul, probs.to(v.dtype), v).flatten(1, 2)[:, None]


# ---------------------------------------------------------------- packed documents


class PackedMask(NamedTuple):
    """Dense and block form of one mask, built only under torch.compile, which removes the one that no layer uses."""

    dense: torch.Tensor  # bool (B, 1, T, T)
    blocks: BlockMask  # for flex_attention, which skips blocks of 128 x 128 without a visible key


def faster_packed_mask(plain, positions, state=None, doc_ids=None):
    """Add the blocks where flex_attention may be used."""
    mask = plain(positions, state, doc_ids)
    if doc_ids is None or doc_ids.shape[1] <= FLEX_BLOCK or not widest_flex_head(doc_ids):
        return mask
    return PackedMask(mask, document_blocks(doc_ids))


def faster_packed_window_mask(plain, positions, state=None, doc_ids=None, window=None):
    """The same with a window, also without documents."""
    if window is None:
        return faster_packed_mask(plain, positions, state, doc_ids)
    mask = plain(positions, state, doc_ids, window)
    n_tokens = positions.shape[1]
    if mask is None or state is not None or n_tokens <= FLEX_BLOCK or not widest_flex_head(positions):
        return mask
    return PackedMask(mask, window_blocks(positions, window, doc_ids))


def document_blocks(doc_ids):
    """Return the BlockMask of causal attention within each document. doc_ids (B, T)."""

    def visible(b, h, q, k):
        return (q >= k) & (doc_ids[b, q] == doc_ids[b, k])

    return create_block_mask(visible, doc_ids.shape[0], None, doc_ids.shape[1], doc_ids.shape[1], doc_ids.device)


def window_blocks(positions, window, doc_ids=None):
    """Return the BlockMask of the last `window` tokens of the same document. positions (1, T), doc_ids (B, T)."""

    def near(b, h, q, k):
        return (q >= k) & (q - k < window)

    def visible(b, h, q, k):
        return near(b, h, q, k) & (doc_ids[b, q] == doc_ids[b, k])

    n_tokens = positions.shape[1]
    batch, of_query = (None, near) if doc_ids is None else (doc_ids.shape[0], visible)
    return create_block_mask(of_query, batch, None, n_tokens, n_tokens, positions.device)


def widest_flex_head(x):
    """Return the size of the widest heads that flex_attention takes in what is computed from `x`; 0 means none.

    Only where it is compiled (eager, it holds all scores; and training must work without Triton) and in 16 bits: the
    tiles of fp32, or of wide heads on a small GPU, do not fit into shared memory.
    """
    if x.device.type != "cuda" or not torch.compiler.is_compiling() or compute_dtype(x).itemsize != 2:
        return 0
    gpu = torch.cuda.get_device_properties(x.device)
    if gpu.major < 8:
        return 0
    return 128 if (gpu.major, gpu.minor) in WITH_LARGE_SHARED_MEMORY else 64


def heads_fit_flex(q, v):
    """Whether flex_attention takes heads of the sizes of q (..., K) and v (..., Kv)."""
    narrow = min(q.shape[-1], v.shape[-1])
    wide = max(q.shape[-1], v.shape[-1])
    return narrow >= NARROWEST_FLEX_HEAD and wide <= widest_flex_head(q)


def _flex_attention(q, k, v, blocks, scale, sink=None):
    dtype = compute_dtype(q)  # it requires one dtype, and may read other columns of a view into a wider tensor
    q, k, v = (x.to(dtype).contiguous().transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    if sink is None:
        return flex_attention(q, k, v, block_mask=blocks, scale=scale, enable_gqa=gqa).transpose(1, 2)
    out, aux = flex_attention(q, k, v, block_mask=blocks, scale=scale, enable_gqa=gqa, return_aux=AuxRequest(lse=True))
    share = (aux.lse - sink[:, None]).sigmoid()  # (B, H, T), of the keys in a denominator with the sink
    return (out * share[..., None].to(out.dtype)).transpose(1, 2)
