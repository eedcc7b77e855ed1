"""Linear recurrences of a matrix-valued memory, computed in chunks.

A head holds a matrix S (K, V), which maps keys to values. Token t fades it and writes to it, then its query reads:

    S' = Diag(exp(g_t)) S_{t-1}
    S_t = S' + k_t u_t^T
    o_t = S_t^T q_t

    u_t = b_t (v_t - S'^T k_t)    the delta rule: what the memory holds under this key is replaced, by the share b_t
    u_t = v_t                     no erasing: the value is added

- Gated delta rule: g_t is a number (Yang et al. 2024, "Gated Delta Networks", 2412.06464, equation 10).
- Kimi Delta Attention: g_t has an element per channel of the key (Kimi Team 2025, 2510.26692, section 3, equation 1).
- State space duality, without erasing (Dao & Gu 2024, "Transformers are SSMs", 2405.21060, section 6).

Unrolled from the memory S_0 before a chunk, with D_tj = exp(g_{j+1} + ... + g_t), what is left of token j's write at t:

    S_t = Diag(D_t0) S_0 + sum_{j <= t} Diag(D_tj) k_j u_j^T
    u_t = b_t (v_t - S_0^T (D_t0 * k_t)) - sum_{j < t} A_tj u_j,    A_tj = b_t k_t^T (D_tj * k_j)

The second line is a triangular system for all u of a chunk: (I + A) U = R. Section 3.3 of 2412.06464 solves it for S_0
unknown, into U - W S_0 (the UT transform), so that all chunks are solved at once. Here chunks come one after another,
S_0 is known, and half of the solution is enough.

Every exponent is a sum of terms <= 0, added up directly: a quotient exp(g_1 + .. + g_t) / exp(g_1 + .. + g_j) may
overflow, and the difference of the two sums loses digits where they are large.
"""

import itertools

import torch
import torch.nn.functional as F

from model.kernels import dispatch
from model.kernels.recurrence import faster_chunk


def delta_rule(q, k, v, decay, beta=None, initial=None, doc_ids=None, chunk_size=64):
    """Run the recurrence over T tokens. q, k (B, T, G, K), v (B, T, H, V) -> out (B, T, H, V), final (B, H, K, V).

    Each of the G heads of q and k serves H / G consecutive memories. decay (B, T, H) or (B, T, H, K): g, <= 0. beta
    (B, T, H): b; None means no erasing. initial (B, H, K, V): the memory before the first token, of the same document;
    None means empty. doc_ids (B, T): each document begins with an empty memory. Computed in fp32, in float64 where v is
    float64; both results have that dtype. The caller scales q.
    """
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    decay = decay if decay.ndim == q.ndim else decay[..., None]  # (B, T, H, 1 | K)
    beta = None if beta is None else beta[..., None]
    if initial is None:
        initial = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    memory = initial.to(dtype)
    with torch.autocast(v.device.type, enabled=False):
        if q.shape[1] == 1:
            out, memory = step(*(None if x is None else x[:, 0].to(dtype) for x in (q, k, v, decay, beta)), memory)
            return out[:, None], memory
        outs, before = [], None
        documents = None if doc_ids is None else _numbered(doc_ids)
        parts = (itertools.repeat(None) if x is None else x.split(chunk_size, dim=1) for x in (beta, documents))
        for *inputs, b, doc in zip(*(x.split(chunk_size, dim=1) for x in (q, k, v, decay)), *parts):
            before = doc[:, :1] if doc is not None and before is None else before
            out, memory = chunk(*inputs, b, memory, doc, before)
            before = None if doc is None else doc[:, -1:]
            outs.append(out)
        return torch.cat(outs, dim=1), memory


def step(q, k, v, g, beta, memory):
    """The recurrence for one token. q, k (B, G, K), v (B, H, V), g (B, H, 1 | K), beta (B, H, 1) or None."""
    q, k = (x.repeat_interleave(v.shape[1] // k.shape[1], dim=1) for x in (q, k))  # (B, H, K)
    memory = g.exp()[..., None] * memory  # (B, H, K, V)
    u = v if beta is None else beta * (v - (memory * k[..., None]).sum(dim=-2))  # (B, H, V)
    memory = memory + k[..., None] * u[..., None, :]
    return (memory * q[..., None]).sum(dim=-2), memory


@dispatch(faster_chunk)
def chunk(q, k, v, g, beta, memory, doc=None, before=None):
    """The recurrence for C tokens at once: what `delta_rule` takes and returns, beta (B, C, H, 1), memory S_0.

    doc (B, C): numbers of the documents; before (B, 1): that of the memory.
    """
    q, k, v, g = (x.transpose(1, 2).to(memory.dtype).contiguous() for x in (q, k, v, g))  # (B, G | H, C, ...)
    at_token = g.cumsum(dim=-2).exp()  # D_t0
    at_end = _sums_after(g).exp()  # D_Cj
    rows = q[..., None, :] if beta is None else torch.stack((q, k), dim=-2)
    scores, *erased = decayed_products(rows, k, g).unbind(dim=-2)  # (B, H, C, C)
    q, k = (x.repeat_interleave(v.shape[1] // k.shape[1], dim=1) for x in (q, k))  # (B, H, C, K)
    if doc is not None:
        same = (doc[:, :, None] == doc[:, None, :])[:, None]  # (B, 1, C, C)
        scores, *erased = (x * same for x in (scores, *erased))
        at_token = at_token * (doc == before)[:, None, :, None]  # the memory reaches its own document only,
        at_end = at_end * same[..., -1, :, None]  # and the last document goes on
    u = v
    if beta is not None:
        beta = beta.transpose(1, 2).to(memory.dtype)  # (B, H, C, 1)
        u = beta * (v - (k * at_token) @ memory)
        u = torch.linalg.solve_triangular(beta * erased[0], u, upper=False, unitriangular=True)
    out = (q * at_token) @ memory + scores @ u  # (B, H, C, V)
    memory = at_token[..., -1, :, None] * memory + (k * at_end).mT @ u
    return out.transpose(1, 2), memory


def decayed_products(x, k, g):
    """Return x_i . (D_ij * k_j) for j <= i, else 0, (B, H, C, R, C).

    x (B, G, C, R, K), R rows per token, which share its decay; k (B, G, C, K); g (B, H, C, 1 | K).
    """
    per_head = g.shape[1] // k.shape[1]
    if g.shape[-1] == 1:
        products = (x.flatten(-3, -2) @ k.mT).unflatten(-2, x.shape[-3:-1])  # (B, G, C, R, C)
        decays = _decay_matrix(g)[..., None, :].unflatten(1, (-1, per_head))
        return (products[:, :, None] * decays).flatten(1, 2)
    x, k = (t.repeat_interleave(per_head, dim=1) for t in (x, k))
    n_tokens = k.shape[-2]
    size = 1 << (n_tokens - 1).bit_length()  # the next power of two
    x = F.pad(x, (0, 0, 0, 0, 0, size - n_tokens))
    k, g = (F.pad(t, (0, 0, 0, size - n_tokens)) for t in (k, g))
    # From blocks of one token, which have no decay, to ever larger ones. Between two neighbouring blocks the decay goes
    # over their border, D_ij = exp(g_{border} + .. + g_i) exp(g_{j+1} + .. + g_{border-1}): two factors of at most 1.
    products = (x * k[..., None, :]).sum(dim=-1)[..., None, :, None]  # (..., C blocks, 1, R, 1)
    length = 1
    while length < size:
        x_right = x.unflatten(-3, (-1, 2, length))[..., 1, :, :, :]  # (..., blocks, length, R, K)
        k_left = k.unflatten(-2, (-1, 2, length))[..., 0, :, :]  # (..., blocks, length, K)
        g_left, g_right = g.unflatten(-2, (-1, 2, length)).unbind(dim=-3)
        x_right = x_right * g_right.cumsum(dim=-2).exp()[..., None, :]
        k_left = k_left * _sums_after(g_left).exp()
        across = (x_right.flatten(-3, -2) @ k_left.mT).unflatten(-2, (length, -1))
        left, right = products.unflatten(-4, (-1, 2)).unbind(dim=-4)  # (..., blocks, length, R, length)
        rows = torch.cat((left, torch.zeros_like(left)), dim=-1), torch.cat((across, right), dim=-1)
        products = torch.cat(rows, dim=-3)
        length *= 2
    return products[..., 0, :n_tokens, :, :n_tokens]


def _decay_matrix(g):
    """D_ij for j <= i, else 0. g (..., C, 1) -> (..., C, C). Sums as in listing 1 of 2405.21060 (segsum)."""
    terms = g.expand(*g.shape[:-1], g.shape[-2]).tril(-1)  # (..., C, C), g_i in row i, left of the diagonal
    return terms.cumsum(dim=-2).exp().tril()


def _sums_after(g):
    """g_{j+1} + ... + g_C for each token j. (..., C, K) -> same."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(dim=-2).flip(-2)


def _numbered(doc_ids):
    """Numbers of the documents in the order of a sequence, equal for neighbours of one document. (B, T) -> same."""
    return F.pad((doc_ids[:, 1:] != doc_ids[:, :-1]).cumsum(dim=1), (1, 0))


def recurrence_flops(n_heads, k_dim, v_dim, seq_len, chunk_size=64, erase=True, per_channel=False, n_k_heads=None):
    """Return the forward FLOPs per token of `delta_rule` on sequences of `seq_len` tokens, the solution included.

    n_k_heads: G, where the heads of keys are fewer.
    """
    size = min(chunk_size, seq_len)
    products = 2 * size * k_dim * (2 if erase else 1)
    products *= n_heads / 2 if per_channel else n_k_heads or n_heads
    values = 2 * size * v_dim + (size * v_dim if erase else 0)
    memory = 2 * k_dim * v_dim * (3 if erase else 2)
    return products + n_heads * (values + memory)
