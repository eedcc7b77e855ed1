"""Muon: momentum whose update is orthogonalized, for the matrices inside the network."""

from typing import Any

import torch

from engine.distributed.fsdp import full_tensor, is_dtensor, local, shard_like
from engine.training.conditional import zero_unless
from engine.training.precision import fast_bf16

# Coefficients of odd quintics x -> a x + b x^3 + c x^5, one per iteration, that together bring every singular value
# near 1: each is optimal for the interval that the one before leaves (Amsel et al. 2025, "The Polar Express",
# section 4).
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115951949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
# bf16 rounding can push a singular value above 1, where the polynomials diverge: their domain is scaled by 1%
SAFETY = 1.01
CACHE_BYTES = 1 << 20  # off CUDA, orthogonalize this much at a time, so that a batch stays in the CPU's cache


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """About the nearest semi-orthogonal matrices, U V^T of the singular value decomposition, by five quintics.

    matrices: (n, rows, cols), rows <= cols. In bf16 where the device multiplies it faster than fp32, else in fp32.
    """
    size = len(matrices) if matrices.is_cuda else max(1, CACHE_BYTES // (4 * matrices[0].numel()))
    return torch.cat([_orthogonalize(piece) for piece in matrices.split(size)])


def _orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    x = matrices.float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)  # singular values in [0, 1), with room for rounding
    rows, cols = x.shape[-2:]
    if not fast_bf16(x.device):
        return (_orthogonalize_wide if 2 * cols > 3 * rows else _orthogonalize_directly)(x)
    scaled = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return _orthogonalize_directly(x.bfloat16(), (*scaled, POLAR_EXPRESS[-1])).to(matrices.dtype)


def _orthogonalize_directly(
    x: torch.Tensor, quintics: tuple[tuple[float, float, float], ...] = POLAR_EXPRESS
) -> torch.Tensor:
    for a, b, c in quintics:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _orthogonalize_wide(x: torch.Tensor) -> torch.Tensor:
    """The same polynomial, iterated on the small Gram matrix: two matmuls of the wide matrix instead of ten.

    With G = x x^T each iteration multiplies x by P = a + b G + c G^2, and G by P^2 (all of them commute). It loses half
    the digits of the small singular values, so it needs fp32.
    """
    gram = x @ x.mT
    product: torch.Tensor | None = None
    for iteration, (a, b, c) in enumerate(POLAR_EXPRESS, start=1):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if iteration < len(POLAR_EXPRESS):
            gram = gram @ (factor @ factor)
    assert product is not None
    return product @ x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized; matrices of equal shape are batched.

    A stack of experts (E, F, D) counts as E matrices. The update has the root mean square of a typical AdamW update,
    0.2 (Liu et al. 2025, "Muon is Scalable for LLM Training", equation 4), so both share one learning rate and one
    decoupled weight decay. In a sharded model a stack is sharded by full matrices, and each process updates its own;
    any other matrix is gathered, one at a time, and orthogonalized by every process.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, good: torch.Tensor) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient where `good`, 0-d bool, is true."""
        for group in self.param_groups:
            by_shape: dict[tuple, list[torch.nn.Parameter]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    rows, cols = param.shape[-2:]
                    alone = id(param) if is_dtensor(param) else None  # gathered one at a time, to bound the memory
                    by_shape.setdefault((min(rows, cols), max(rows, cols), alone), []).append(param)
            for (small, large, _), params in by_shape.items():
                self._step_batch(params, (small, large), group, good)

    def _step_batch(
        self, params: list[torch.nn.Parameter], shape: tuple[int, int], group: dict[str, Any], good: torch.Tensor
    ) -> None:
        directions = []
        for param in params:
            assert param.grad is not None
            state = self.state[param]
            if not state:
                state["momentum"] = torch.zeros_like(param)
            weight = torch.where(good, 1 - group["momentum"], 0.0)
            local(state["momentum"]).lerp_(zero_unless(good, local(param.grad)), weight)
            nesterov = param.grad.lerp(state["momentum"], group["momentum"])
            nesterov = full_tensor(nesterov) if param.ndim == 2 else local(nesterov)
            wide = nesterov if param.shape[-2] <= param.shape[-1] else nesterov.mT
            directions.append(wide.reshape(-1, *shape))
        matrices = torch.cat(directions)
        # with fewer experts than processes some processes hold none
        updates = orthogonalize(matrices) if len(matrices) else matrices
        scale = 0.2 * shape[1] ** 0.5
        for param, update in zip(params, updates.split([len(d) for d in directions]), strict=True):
            if param.shape[-2] > param.shape[-1]:
                update = update.mT
            mine = local(param)
            if param.ndim == 2:
                update = local(shard_like(update.reshape(param.shape), param))
            # a skipped step: times 1, minus 0
            mine.mul_(torch.where(good, 1 - group["lr"] * group["weight_decay"], 1.0))
            mine.add_(zero_unless(good, update.reshape(mine.shape)), alpha=-group["lr"] * scale)
