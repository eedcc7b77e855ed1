"""Depthwise causal convolutions over time on a CPU: one pass over memory per tap.

Shapes: B batch, T tokens, D channels, J taps; inputs are (B, J - 1 + T, D).
"""

import torch


def faster_taps(plain, inputs, weight, doc_ids=None):
    """A single token is one weighted sum; eager training on a CPU adds the taps in place."""
    n_taps = weight.shape[1]
    if inputs.shape[1] == n_taps and doc_ids is None:
        return (inputs * weight.T).sum(dim=1, keepdim=True).to(inputs.dtype)
    if torch.is_grad_enabled() and inputs.device.type == "cpu" and not torch.compiler.is_compiling():
        dtype = torch.promote_types(inputs.dtype, weight.dtype)
        return _Taps.apply(inputs.to(dtype), weight.to(dtype), doc_ids).to(inputs.dtype)
    return plain(inputs, weight, doc_ids)


class _Taps(torch.autograd.Function):
    """The sum of the taps, differentiable once."""

    @staticmethod
    def forward(ctx, inputs, weight, doc_ids):
        ctx.save_for_backward(inputs, weight)
        ctx.crossing = _crossing(doc_ids, weight.shape[1])
        last = weight.shape[1] - 1
        out = inputs[:, last:] * weight[:, last]
        for tap in range(last):
            _add_product(out, inputs[:, tap : tap + out.shape[1]], weight[:, tap], ctx.crossing[tap])
        return out

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        last = weight.shape[1] - 1
        n_tokens = grad.shape[1]
        grad_inputs = torch.cat((grad.new_zeros(grad.shape[0], last, grad.shape[2]), grad * weight[:, last]), dim=1)
        grad_weight = torch.empty_like(weight)
        for tap in range(last + 1):
            read = slice(tap, tap + n_tokens)
            tokens = ctx.crossing[tap]
            if tap < last:
                _add_product(grad_inputs[:, read], grad, weight[:, tap], tokens)
            total = sum((of_grad * x).sum(dim=0) for of_grad, x in zip(grad, inputs[:, read]))  # in the CPU's cache
            if tokens is not None:
                total = total - (grad[tokens] * inputs[:, read][tokens]).sum(dim=0)
            grad_weight[:, tap] = total
        return grad_inputs, grad_weight, None


def _crossing(doc_ids, n_taps):
    """Return for each tap the (sequence, token) at which it would read another document; None without documents."""
    if doc_ids is None:
        return [None] * n_taps
    own = doc_ids[:, n_taps - 1 :]
    return [(doc_ids[:, tap : tap + own.shape[1]] != own).nonzero(as_tuple=True) for tap in range(n_taps)]


def _add_product(out, x, weight, tokens):
    """out (B, T, D) += x * weight, in place, except at `tokens`."""
    kept = None if tokens is None else out[tokens]
    out.addcmul_(x, weight)
    if tokens is not None:
        out[tokens] = kept
