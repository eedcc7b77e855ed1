"""Settled parts that architectures share: norms, rotary positions, attention, SwiGLU, the loss.

What is new in a paper belongs in that paper's own file. Nothing here knows about any one model.
Shapes: B batch, T tokens, S keys, D dim, H heads, G kv heads, K head dim, F ffn width, V vocab.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.basemodel import ModelError
from model.kernels.cpu_attention import LONGEST, blocked_attention
from model.kernels.decode import can_attend, in_use, one_query_attention, visible_keys


class RMSNorm(nn.Module):
    """Scale each vector to root mean square 1, then by a learned weight (Zhang & Sennrich 2019). (..., D) -> same."""

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        weight = self.weight.to(x.dtype)  # fused for one type only
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _LowRMSNorm.apply(x, weight, self.eps)
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


class _LowRMSNorm(torch.autograd.Function):
    """F.rms_norm in a 16-bit type, in fp32 inside: on a processor PyTorch has no kernel for it, and takes twice the
    passes over memory."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        normed = x.float()  # a copy, so that what follows may write into it
        scale = torch.linalg.vector_norm(normed, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return normed.mul_(scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, grad_x = x.float().mul_(scale), grad.float()
        grad_weight = (normed * grad_x).reshape(-1, len(weight)).sum(dim=0)
        grad_x.mul_(weight)
        radial = (normed * grad_x).mean(dim=-1, keepdim=True)  # along x the output does not change
        return grad_x.addcmul_(normed, radial, value=-1).mul_(scale).to(x.dtype), grad_weight.to(weight.dtype), None


class Embedding(nn.Embedding):
    """Rows of a table, (...) int64 -> (..., D); under autocast in its type, so that the stream they begin is, too."""

    def forward(self, ids):
        return super().forward(ids).to(compute_dtype(self.weight))


def compute_dtype(x):
    """Return the type in which matmuls with `x` are done: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020). (..., D) -> (..., D)."""

    def __init__(self, dim, inter_dim):
        super().__init__()
        self.gate_proj = nn.Linear(dim, inter_dim, bias=False)
        self.up_proj = nn.Linear(dim, inter_dim, bias=False)
        self.down_proj = nn.Linear(inter_dim, dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ------------------------------------------------------------------- positions


@dataclass
class RopeArgs:
    """How rotary positions reach beyond the length of the training; mix it into a model's arguments.

    Slow pairs, which have not finished a turn within the original length, are slowed down by `rope_factor`, so that the
    longer sequence shows them no new angle; fast pairs are left alone; between the two there is a ramp.
    """

    rope_type: str = "default"  # default: as trained; llama3: Llama 3.1's ramp; yarn: YaRN's ramp
    rope_factor: float = 1.0  # s, how many times longer
    rope_original_max_seq_len: int = 0  # tokens, the length of the training; llama3 and yarn need it
    rope_low_freq_factor: float = 1.0  # llama3: pairs of fewer turns in the original length are slowed down in full
    rope_high_freq_factor: float = 4.0  # llama3: pairs of more turns are left alone
    rope_beta_slow: float = 1.0  # yarn: as rope_low_freq_factor
    rope_beta_fast: float = 32.0  # yarn: as rope_high_freq_factor
    rope_mscale: float = 0.0  # yarn: weight of DeepSeek's correction of cos and sin; 0 = YaRN's own
    rope_mscale_all_dim: float = 0.0  # yarn: its counterpart over the whole head, which moves to the softmax scale

    def check_rope(self):
        """Raise `ModelError` unless the fields above fit together; call it in `__post_init__`."""
        if self.rope_type not in ("default", "llama3", "yarn"):
            raise ModelError(f"rope_type={self.rope_type}: choose default, llama3 or yarn")
        if self.rope_type == "default":
            if self.rope_factor != 1:
                raise ModelError(f"rope_factor={self.rope_factor} needs a way to stretch: rope_type=llama3 or yarn")
            return
        if self.rope_factor < 1:
            raise ModelError(f"rope_factor={self.rope_factor} must be at least 1, positions are stretched")
        if self.rope_original_max_seq_len < 1:
            raise ModelError(f"rope_type={self.rope_type} needs rope_original_max_seq_len, the tokens trained on")
        low, high = "rope_beta_slow", "rope_beta_fast"
        if self.rope_type == "llama3":
            low, high = "rope_low_freq_factor", "rope_high_freq_factor"
        if not 0 < getattr(self, low) < getattr(self, high):
            raise ModelError(f"{low}={getattr(self, low)} must lie between 0 and {high}={getattr(self, high)}")


def rope_frequencies(head_dim, theta, scaling=None):
    """Return the angle a token of each pair (K/2,), float64: theta^(-2j/K), stretched as `scaling` (RopeArgs) says."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling is None or scaling.rope_type == "default":
        return frequencies
    if scaling.rope_type == "llama3":
        kept = _llama3_ramp(frequencies, scaling)
    else:
        kept = _yarn_ramp(head_dim, theta, scaling)
    return frequencies * (kept + (1 - kept) / scaling.rope_factor)


def _llama3_ramp(frequencies, scaling):
    """How much of each frequency is kept, linear in its turns (Meta's llama-models, apply_scaling of Llama 3.1)."""
    turns = scaling.rope_original_max_seq_len * frequencies / (2 * math.pi)
    low, high = scaling.rope_low_freq_factor, scaling.rope_high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_ramp(head_dim, theta, scaling):
    """The same, linear in the number of the pair (Peng et al. 2023, "YaRN", section 3.2, and DeepSeek-V3's code)."""

    def pair_of(turns):  # the pair, counted in halves of K, that turns so often within the original length
        return head_dim * math.log(scaling.rope_original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_of(scaling.rope_beta_fast)), 0)
    last = min(math.ceil(pair_of(scaling.rope_beta_slow)), head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float64)
    return 1 - ((pairs - first) / (last - first if last != first else 0.001)).clamp(0, 1)


def yarn_mscale(factor, mscale=1.0):
    """Return 0.1 m ln s + 1, by which YaRN sharpens an attention that sees s times more keys (equation 22 there)."""
    return 0.1 * mscale * math.log(factor) + 1.0


def rope_amplitude(scaling=None):
    """Return the factor on cos and sin: YaRN's, or with both mscales given DeepSeek's quotient, else 1."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    factor, mscale, all_dim = scaling.rope_factor, scaling.rope_mscale, scaling.rope_mscale_all_dim
    return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if mscale and all_dim else yarn_mscale(factor)


class Rotary(nn.Module):
    """Tables of the rotary position embedding (Su et al. 2021): pair j of a head turns by pos * theta^(-2j/K).

    `scaling`, a RopeArgs, stretches them. `forward(positions)` (1|B, T) -> cos, sin (1|B, T, 1, K/2), fp32, ready to
    broadcast over heads.
    """

    def __init__(self, head_dim, max_seq_len, theta, scaling=None):
        super().__init__()
        frequencies = rope_frequencies(head_dim, theta, scaling)
        angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)
        amplitude = rope_amplitude(scaling)
        self.register_buffer("cos", (angles.cos() * amplitude).float(), persistent=False)
        self.register_buffer("sin", (angles.sin() * amplitude).float(), persistent=False)

    def forward(self, positions):
        return self.cos[positions][:, :, None], self.sin[positions][:, :, None]


def rotate(x, cos, sin):
    """Turn the pairs (x[j], x[j + K/2]) of every head by their angles. x (B, T, H, K) -> same shape and dtype.

    Other code pairs neighbours; `interleaved_rows` of hf.py explains why that is the same model.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def token_positions(input_ids, state=None):
    """Return the positions of `input_ids` (B, T): (1, T) from 0 on, or (B, T) after what `state` has seen."""
    if state is not None:
        return state.positions(input_ids.shape[1])
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None]


# ------------------------------------------------------------------- attention


def attention_mask(positions, state=None, doc_ids=None):
    """Return which keys each query may see: None for plain causal attention, else bool (B, 1, T, S), True = visible.

    Built once a forward and shared by all layers. With a state the keys are its first `max_pos + T` slots, and a row sees
    those up to its own position; slots beyond it may hold leftovers. With doc_ids (B, T) only the same document.
    """
    if state is not None and doc_ids is not None:
        raise ValueError("doc_ids and state together are not supported: decode each document in a row of its own")
    if state is not None and state.max_pos > 0:
        n_keys = state.max_pos + positions.shape[1]
        if positions.dtype == torch.int64 and in_use(positions):
            return visible_keys(positions, n_keys)
        return (torch.arange(n_keys, device=positions.device) <= positions[..., None])[:, None]
    if doc_ids is not None:
        causal = positions[0, :, None] >= positions[0, None, :]  # (T, T)
        return (causal & (doc_ids[:, :, None] == doc_ids[:, None, :]))[:, None]
    return None


def packed_mask(positions, state=None, doc_ids=None):
    """Return the same for those who hand it to `attention` and to nobody else: for packed rows (B, T) where
    flex_attention may be used it is a `PackedMask`."""
    mask = attention_mask(positions, state, doc_ids)
    if doc_ids is None or doc_ids.shape[1] <= FLEX_BLOCK or not widest_flex_head(doc_ids):
        return mask
    return PackedMask(mask, document_blocks(doc_ids))


FLEX_BLOCK = 128  # tokens; in a row of one block there is none to leave out, and the compiler fails on its list
NARROWEST_FLEX_HEAD = 16  # numbers; the least that Triton multiplies
WITH_LARGE_SHARED_MEMORY = (8, 0), (9, 0), (10, 0), (10, 3)  # CUDA capabilities: A100, H100 and H200, B200, B300


class PackedMask(NamedTuple):
    """Who sees whom in packed rows, twice: a compiled forward, where alone it is made, drops what no layer uses."""

    dense: torch.Tensor  # bool (B, 1, T, T)
    blocks: BlockMask  # for flex_attention, which passes over the blocks of 128 x 128 where nobody sees anybody


def document_blocks(doc_ids):
    """Return the BlockMask of causal attention within each document. doc_ids (B, T)."""

    def visible(b, h, q, k):
        return (q >= k) & (doc_ids[b, q] == doc_ids[b, k])

    return create_block_mask(visible, doc_ids.shape[0], None, doc_ids.shape[1], doc_ids.shape[1], doc_ids.device)


def widest_flex_head(x):
    """Return the size of the widest heads that flex_attention takes in what is computed from `x`; 0: of none.

    Only where it is compiled (else it keeps all scores, and a user without Triton must be able to train) and in 16
    bits: the tiles of fp32, or of wide heads on a small GPU, do not fit into its shared memory.
    """
    if x.device.type != "cuda" or not torch.compiler.is_compiling() or compute_dtype(x).itemsize != 2:
        return 0
    gpu = torch.cuda.get_device_properties(x.device)
    return 0 if gpu.major < 8 else 128 if (gpu.major, gpu.minor) in WITH_LARGE_SHARED_MEMORY else 64


def _one_query_attention(q, k, v, mask, scale):
    """Attention of one query a row, on the CPU: PyTorch's fused kernel takes many at a time, and is slow with one."""
    q = q[:, 0].unflatten(1, (k.shape[2], -1))  # (B, G, H / G, K)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, S, K)
    scores = small_matmul(q, k.mT).float() * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    # softmax, but compiled it would divide anew for every number of v that a weight meets
    probs = weights * weights.sum(dim=-1, keepdim=True).reciprocal()
    return small_matmul(probs.to(v.dtype), v).flatten(1, 2)[:, None]


SMALL = 16  # rows


def small_matmul(a, b):
    """a @ b for many pairs of few rows a: compiled for the CPU it is a sum, which the compiler fuses with what stands
    around it; the library's product of matrices so small takes several times as long."""
    if a.shape[-2] <= SMALL and a.device.type == "cpu" and torch.compiler.is_compiling():
        return (a[..., None].float() * b.unsqueeze(-3)).sum(dim=-2).to(a.dtype)
    return a @ b


def attention(q, k, v, mask=None, scale=None):
    """Softmax attention with grouped heads. q (B, T, H, K), k (B, S, G, K), v (B, S, G, Kv) -> (B, T, H, Kv).

    mask None means causal with S == T; else bool (B, 1, T, S) or PackedMask. scale defaults to 1 / sqrt(K).
    """
    if isinstance(mask, PackedMask):
        if NARROWEST_FLEX_HEAD <= min(q.shape[-1], v.shape[-1]) <= max(q.shape[-1], v.shape[-1]) <= widest_flex_head(q):
            dtype = compute_dtype(q)  # it wants one type; and of a view into a wider tensor it may read other columns
            q, k, v = (x.to(dtype).contiguous().transpose(1, 2) for x in (q, k, v))
            return flex_attention(
                q, k, v, block_mask=mask.blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            ).transpose(1, 2)
        mask = mask.dense
    cpu = q.device.type == "cpu"
    # the number of keys is asked last: a compiled step of decoding would be compiled anew where it passes LONGEST
    if torch.is_grad_enabled() and cpu and q.dtype in (torch.bfloat16, torch.float32) and k.shape[1] <= LONGEST:
        return blocked_attention(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    if q.shape[1] == 1 and mask is not None and cpu:
        one_query = one_query_attention if can_attend(q, k, v) else _one_query_attention
        return one_query(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    v_dim = v.shape[-1]
    if v_dim < q.shape[-1]:  # the fused kernels want one head size; zero columns change nothing
        v = F.pad(v, (0, q.shape[-1] - v_dim))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)[..., :v_dim]


def cache_append(state, layer, name, new):
    """Write `new` (B, T, ...) behind what each row of `state` holds and return all slots in use (B, max_pos + T, ...).

    Slots that a row has not reached hold zeros or leftovers: mask them (`attention_mask` does).
    """
    cache = state.layers[layer]
    if name not in cache:
        cache[name] = new.new_zeros(new.shape[0], state.max_len, *new.shape[2:])
        state.token_indexed.add(name)
    rows = torch.arange(new.shape[0], device=new.device)[:, None]
    cache[name][rows, state.positions(new.shape[1])] = new.to(cache[name].dtype)
    return cache[name][:, : state.max_pos + new.shape[1]]


# ------------------------------------------------------------------- loss


CHUNK_ROWS = 512  # tokens of a chunk of the loss, on a processor
CACHE_BYTES = 2 << 20  # of fp32 numbers that a processor's core holds at hand from one pass over them to the next


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sums of the cross-entropies and, if wanted, of log(Z)^2, Z the normaliser of the softmax.

    Their gradients are computed in the forward pass, one chunk of tokens at a time.
    """

    @staticmethod
    def forward(ctx, hidden, full_weight, targets, chunk, with_squares):
        weight = full_weight.to(hidden.dtype)
        entropy, squares = hidden.new_zeros(2, dtype=torch.float32)
        need_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        like = torch.empty_like if len(hidden) else torch.zeros_like
        grads = [
            (torch.empty_like(hidden), like(full_weight, dtype=torch.float32))
            for _ in range((1 + with_squares) if need_grad else 0)
        ]
        whole = hidden.is_cuda or torch.compiler.is_compiling()  # there, passes are fused or few are best
        piece = chunk if whole else max(1, CACHE_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ weight.T  # (chunk, V)
            by_squares = torch.empty_like(logits) if need_grad and with_squares else logits
            for part, by_square, target in zip(*(x.split(piece) for x in (logits, by_squares, targets[rows]))):
                valid, index = target[:, None] != -100, target[:, None].clamp(min=0)
                top = part.amax(dim=-1, keepdim=True)
                softmax = part.softmax(dim=-1, dtype=torch.float32)
                log_z = top - softmax.amax(dim=-1, keepdim=True).log()  # the largest is at least 1 / V
                log_p = part.gather(1, index) - log_z
                entropy -= (log_p * valid).sum()
                squares += (log_z.square() * valid).sum()
                if need_grad:  # d log Z / d logits = softmax; the logits themselves are needed no more
                    if with_squares:
                        by_square.copy_(softmax * (2 * log_z)).mul_(valid)
                    if torch.compiler.is_compiling():  # a scatter would part the program in two
                        chosen = index == torch.arange(weight.shape[0], device=weight.device)
                        part.copy_(torch.where(chosen, log_p.expm1(), softmax) * valid)
                    else:
                        part.copy_(softmax.scatter_(1, index, log_p.expm1())).mul_(valid)
            for grad, (grad_hidden, grad_weight) in zip((logits, by_squares), grads):
                torch.mm(grad, weight, out=grad_hidden[rows])
                _add(grad_weight, grad.T @ hidden[rows], whole) if start else grad_weight.copy_(grad.T @ hidden[rows])
        ctx.save_for_backward(*(tensor for pair in grads for tensor in pair))
        return entropy, squares

    @staticmethod
    def backward(ctx, *incoming):
        saved = ctx.saved_tensors
        grad_hidden, grad_weight = saved[0] * incoming[0].to(saved[0].dtype), saved[1] * incoming[0]
        if len(saved) > 2:
            grad_hidden += saved[2] * incoming[1].to(saved[2].dtype)
            grad_weight += saved[3] * incoming[1]
        return grad_hidden, grad_weight, None, None, None


def _add(total, part, whole):
    """total += part, of a smaller type: in one pass, or (PyTorch's for a processor adds number by number) by pieces."""
    if whole:
        total.add_(part)
        return
    rows = max(1, CACHE_BYTES // (4 * total.shape[1]))
    for piece, of_part in zip(total.split(rows), part.split(rows)):
        piece.add_(of_part.float())


_squares = None  # a list while `log_normalisers` is entered


@contextmanager
def log_normalisers():
    """A context that yields a list; each `lm_loss` in it appends its mean of log(Z)^2 over the valid targets, 0-d with
    a graph: what a z-loss needs, from where the logits are."""
    global _squares
    before, _squares = _squares, []
    try:
        yield _squares
    finally:
        _squares = before


def lm_loss(hidden, weight, targets, chunk_bytes=None):
    """Mean cross-entropy of the next token, never holding the logits of more than a chunk of tokens.

    hidden (B, T, D), weight (V, D) of the output head, targets (B, T) with -100 = ignored. Returns a 0-d fp32 tensor:
    the mean over the valid targets in nats, 0 with a graph when none is valid. Three matmuls as with plain logits,
    no recomputation; the memory is `chunk_bytes` of logits, in the compute type, plus one gradient of the weight.
    They default to 32 MB, on a processor to 16 and at most `CHUNK_ROWS` tokens: what is larger, its fp32 copy included,
    the allocator gives back each time, and to take it from the system anew costs as much as the product.
    """
    dtype = compute_dtype(hidden)
    cpu = hidden.device.type == "cpu"
    chunk_bytes = chunk_bytes or (16 if cpu else 32) << 20
    targets = targets.reshape(-1)
    chunk = max(1, min(chunk_bytes // (dtype.itemsize * weight.shape[0]), CHUNK_ROWS if cpu else len(targets)))
    entropy, squares = _ChunkedCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]).to(dtype), weight, targets, chunk, _squares is not None
    )
    count = (targets != -100).sum().clamp(min=1)
    if _squares is not None:
        _squares.append(squares / count)
    return entropy / count
