"""RMSNorm in bf16 on a CPU, where PyTorch has no fused kernel."""

import torch


def faster_rms_norm(plain, x, weight, eps):
    """Eager bf16 on a CPU: half the passes over memory of `F.rms_norm`."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _CpuRMSNorm.apply(x, weight, eps)
    return plain(x, weight, eps)


class _CpuRMSNorm(torch.autograd.Function):
    """`F.rms_norm` of 16-bit inputs, in fp32 inside."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        normed = x.float()  # a copy, so the operations below may be in place
        scale = torch.linalg.vector_norm(normed, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return normed.mul_(scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed = x.float().mul_(scale)
        grad_x = grad.float()
        grad_weight = (normed * grad_x).reshape(-1, len(weight)).sum(dim=0)
        grad_x.mul_(weight)
        radial = (normed * grad_x).mean(dim=-1, keepdim=True)  # the output does not change along x
        return grad_x.addcmul_(normed, radial, value=-1).mul_(scale).to(x.dtype), grad_weight.to(weight.dtype), None
