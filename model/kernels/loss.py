"""Cross-entropy over a large vocabulary without holding the logits of more than a chunk of tokens.

Shapes: N tokens, D dim, V vocab.
"""

import torch

from model.kernels.precision import compute_dtype

CHUNK_TOKENS = 512  # at most, per chunk, on a CPU
CACHE_BYTES = 2 << 20  # of fp32 that the cache of a CPU core holds from one pass to the next


def faster_token_losses(plain, hidden, weight, targets, chunk_bytes=None, with_squares=False):
    """Compute the gradients in the forward pass, chunk by chunk: three matmuls as with plain logits, no recomputation.

    The memory is `chunk_bytes` of logits in the compute dtype, plus one gradient of the weight. The default is 32 MB;
    on a CPU 16 MB and at most `CHUNK_TOKENS` tokens, since its allocator returns larger blocks to the system.
    """
    dtype = compute_dtype(hidden)
    on_cpu = hidden.device.type == "cpu"
    chunk_bytes = chunk_bytes or (16 if on_cpu else 32) << 20
    longest = CHUNK_TOKENS if on_cpu else len(targets)
    chunk = max(1, min(chunk_bytes // (dtype.itemsize * weight.shape[0]), longest))
    return _ChunkedCrossEntropy.apply(hidden.to(dtype), weight, targets, chunk, with_squares)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sums of the cross-entropies and, if wanted, of log(Z)^2, Z the normaliser of the softmax."""

    @staticmethod
    def forward(ctx, hidden, full_weight, targets, chunk, with_squares):
        weight = full_weight.to(hidden.dtype)
        sums = hidden.new_zeros(2, dtype=torch.float32)
        need_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grads = _empty_gradients(hidden, full_weight, (1 + with_squares) if need_grad else 0)
        one_pass = hidden.is_cuda or torch.compiler.is_compiling()  # there, passes are fused or few are best
        piece = chunk if one_pass else max(1, CACHE_BYTES // (4 * weight.shape[0]))
        entropy, squares = sums
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
                if need_grad:  # d log Z / d logits = softmax; the logits are overwritten by their gradient
                    if with_squares:
                        by_square.copy_(softmax * (2 * log_z)).mul_(valid)
                    _entropy_gradient(part, softmax, log_p, index, valid)
            for grad, (grad_hidden, grad_weight) in zip((logits, by_squares), grads):
                torch.mm(grad, weight, out=grad_hidden[rows])
                _add(grad_weight, grad.T @ hidden[rows], one_pass) if start else grad_weight.copy_(
                    grad.T @ hidden[rows]
                )
        ctx.save_for_backward(*(tensor for pair in grads for tensor in pair))
        return entropy, squares

    @staticmethod
    def backward(ctx, *incoming):
        saved = ctx.saved_tensors
        grad_hidden = saved[0] * incoming[0].to(saved[0].dtype)
        grad_weight = saved[1] * incoming[0]
        if len(saved) > 2:
            grad_hidden += saved[2] * incoming[1].to(saved[2].dtype)
            grad_weight += saved[3] * incoming[1]
        return grad_hidden, grad_weight, None, None, None


def _empty_gradients(hidden, weight, n):
    """Return `n` pairs of buffers for the gradients of hidden and, in fp32, of the weight."""
    like = torch.empty_like if len(hidden) else torch.zeros_like
    return [(torch.empty_like(hidden), like(weight, dtype=torch.float32)) for _ in range(n)]


def _entropy_gradient(logits, softmax, log_p, index, valid):
    """Overwrite logits (N, V) by the gradient of the summed cross-entropy, softmax - one_hot(target)."""
    if torch.compiler.is_compiling():  # a scatter would cut the compiled graph's kernel in two
        chosen = index == torch.arange(logits.shape[1], device=logits.device)
        logits.copy_(torch.where(chosen, log_p.expm1(), softmax) * valid)
    else:
        logits.copy_(softmax.scatter_(1, index, log_p.expm1())).mul_(valid)


def _add(total, part, one_pass):
    """total += part, of a smaller dtype: in one pass, or by pieces, since PyTorch's mixed add is scalar on a CPU."""
    if one_pass:
        total.add_(part)
        return
    rows = max(1, CACHE_BYTES // (4 * total.shape[1]))
    for piece, of_part in zip(total.split(rows), part.split(rows)):
        piece.add_(of_part.float())
