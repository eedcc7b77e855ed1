"""Optimizers: Muon for the matrices inside the network, AdamW for everything else, behind one interface."""

from contextlib import contextmanager
from functools import cache

import torch

from engine.distributed.fsdp import full_tensor, is_dtensor, local, shard_like

# Coefficients of odd quintics x -> a x + b x^3 + c x^5, one a step, that together bring every singular value near 1:
# each is best for the interval that the steps before it leave (Amsel et al. 2025, "The Polar Express", section 4).
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115951949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


SAFETY = 1.01  # bf16 may round a singular value up to where the quintics grow fast: they are drawn out by a hundredth
CACHE_BYTES = 1 << 20  # matrices orthogonalized at a time off CUDA: they stay in the cache from product to product


def orthogonalize(matrices):
    """Return about the nearest semi-orthogonal matrices, U V^T of the singular value decomposition, by five quintics.

    matrices (n, rows, cols) with rows <= cols. In bf16 where the device multiplies it faster than fp32, else in fp32.
    """
    size = len(matrices) if matrices.is_cuda else max(1, CACHE_BYTES // (4 * matrices[0].numel()))
    return torch.cat([_orthogonalize(piece) for piece in matrices.split(size)])


def _orthogonalize(matrices):
    x = matrices.float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)  # singular values in [0, 1), rounding allowed for
    rows, cols = x.shape[-2:]
    if not fast_bf16(x.device):
        return (_orthogonalize_wide if 2 * cols > 3 * rows else _orthogonalize_directly)(x)
    drawn_out = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return _orthogonalize_directly(x.bfloat16(), [*drawn_out, POLAR_EXPRESS[-1]]).to(matrices.dtype)


def _orthogonalize_directly(x, quintics=POLAR_EXPRESS):
    for a, b, c in quintics:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


@cache
def fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply bf16 matrices."""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("arm_bf16"))
    return device.type == "cuda"


def _orthogonalize_wide(x):
    """The same polynomial, iterated on the small Gram matrix: the wide one is multiplied twice, not ten times.

    With G = x x^T each step multiplies x by P = a + b G + c G^2, and G by P^2 (all of them commute). It loses half the
    digits of the small singular values, so it needs fp32.
    """
    gram = x @ x.mT
    product = None
    for step, (a, b, c) in enumerate(POLAR_EXPRESS, start=1):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step < len(POLAR_EXPRESS):
            gram = gram @ (factor @ factor)
    return product @ x


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW."""

    def step(self, good):
        """Update every parameter that has a gradient where `good`, 0-d bool, is true."""
        if good.is_mps:  # whose kernels do not look at found_inf
            if good.item():
                super().step()
            return
        self.found_inf = 1 - good.float()  # as torch.amp.GradScaler would tell it
        super().step()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, one matrix at a time but batched over equal shapes.

    A stack of experts (E, F, D) counts as E matrices. The update has the root mean square of a typical AdamW update,
    0.2 (Liu et al. 2025, "Muon is Scalable for LLM Training", equation 4), so both share one learning rate and one
    decoupled weight decay. Of a model that is shared out, a stack is dealt out by whole matrices, and each process
    updates its own; any other matrix is gathered, one at a time, and orthogonalized by every process.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, good):
        """Update every parameter that has a gradient where `good`, 0-d bool, is true."""
        for group in self.param_groups:
            by_shape = {}
            for param in group["params"]:
                if param.grad is not None:
                    rows, cols = param.shape[-2:]
                    alone = id(param) if is_dtensor(param) else None  # gathered with others, they would fill the memory
                    by_shape.setdefault((min(rows, cols), max(rows, cols), alone), []).append(param)
            for (*shape, _), params in by_shape.items():
                self._step_batch(params, shape, group, good)

    def _step_batch(self, params, shape, group, good):
        directions = []
        for param in params:
            state = self.state[param]
            if not state:
                state["momentum"] = torch.zeros_like(param)
            weight = torch.where(good, 1 - group["momentum"], 0.0)
            local(state["momentum"]).lerp_(or_zero(good, local(param.grad)), weight)
            nesterov = param.grad.lerp(state["momentum"], group["momentum"])
            nesterov = full_tensor(nesterov) if param.ndim == 2 else local(nesterov)
            wide = nesterov if param.shape[-2] <= param.shape[-1] else nesterov.mT
            directions.append(wide.reshape(-1, *shape))
        matrices = torch.cat(directions)
        updates = orthogonalize(matrices) if len(matrices) else matrices  # fewer experts than processes: some hold none
        scale = 0.2 * shape[1] ** 0.5
        for param, update in zip(params, updates.split([len(d) for d in directions]), strict=True):
            if param.shape[-2] > param.shape[-1]:
                update = update.mT
            mine = local(param)
            if param.ndim == 2:
                update = local(shard_like(update.reshape(param.shape), param))
            # a step not taken: times 1, less 0
            mine.mul_(torch.where(good, 1 - group["lr"] * group["weight_decay"], 1.0))
            mine.add_(or_zero(good, update.reshape(mine.shape)), alpha=-group["lr"] * scale)


def bits(tensor):
    """The same memory as whole numbers: a processor masks several of those at a time, unlike in torch.where."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def or_zero(good, tensor):
    """Make `tensor` zero in place where `good`, 0-d bool, is false, NaN and all; return it."""
    whole_numbers = bits(tensor)
    whole_numbers.bitwise_and_(-good.to(whole_numbers.dtype))
    return tensor


def choose(good, new, old):
    """Overwrite `old` by `new` where `good`, 0-d bool, is true: old ^ ((new ^ old) & mask). `new` is spent."""
    new, old = bits(new), bits(old)
    old.bitwise_xor_(new.bitwise_xor_(old).bitwise_and_(-good.to(new.dtype)))


class Average(torch.optim.Optimizer):
    """No optimizer, but it steps and is saved as one: an exponential moving average of the parameters.

    The decay of update n (from 1) is min(decay, n / (n + 9)), so that the average soon forgets the initial weights.
    """

    def __init__(self, params, decay):
        super().__init__(params, {"decay": decay, "capturable": True})  # PyTorch then loads `step` onto the device

    @torch.no_grad()
    def step(self, good):
        """Move the average of every parameter towards its present value where `good`, 0-d bool, is true."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["step"], state["average"] = torch.zeros((), device=param.device), param.clone()
                # an earlier version kept it on the CPU
                count = state["step"] = state["step"].to(param.device).add_(good)
                decay = (count / (count + 9)).clamp(max=group["decay"]).masked_fill(count == 1, 0)  # the average begins
                average = local(state["average"])
                choose(good, average.lerp(local(param), 1 - decay), average)

    @torch.no_grad()
    def swap(self):
        """Exchange the parameters and their averages; a second call puts them back, to the bit."""
        for param, state in self.state.items():
            value = param.clone()
            param.copy_(state["average"])
            state["average"].copy_(value)


class CombinedOptimizer:
    """Several optimizers that step as one. Each parameter group has an `lr_scale`: its share of the learning rate.

    average: an `Average` of the same parameters, which steps after them; or None.
    """

    def __init__(self, *optimizers, average=None):
        self.optimizers, self.average = optimizers, average
        self.all = [*optimizers, average] if average else list(optimizers)

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def set_lr(self, lr):
        """Set the learning rate of every group to `lr` times its `lr_scale`."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    @contextmanager
    def averaged(self):
        """A context in which the parameters are their moving averages, when there are any."""
        if self.average is not None:
            self.average.swap()
        try:
            yield
        finally:
            if self.average is not None:
                self.average.swap()

    def step(self, good):
        """Step where `good`, 0-d bool on the parameters' device, is true; else all stays as it was, to the bit.

        Nothing waits for the device (but on MPS). States that a first step makes are there after either.
        """
        for optimizer in self.all:
            optimizer.step(good)

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self):
        return {"optimizers": [optimizer.state_dict() for optimizer in self.all]}

    def load_state_dict(self, state):
        for optimizer, saved in zip(self.all, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def build_optimizer(model, config):
    """Return the `CombinedOptimizer` for `model.param_groups()`.

    config: optimizer ("muon" or "adamw"), max_lr, betas, weight_decay (on matrices only), embed_lr_scale and
    scalar_lr_scale (learning rates of embeddings and of vectors, as multiples of max_lr), ema (decay, 0: none).
    """
    groups = model.param_groups()
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    grouped = [id(p) for params in groups.values() for p in params]
    assert len(grouped) == len(set(grouped)) and set(grouped) == trainable, (
        f"{type(model).__name__}.param_groups() must hold every trainable parameter exactly once"
    )
    adamw = [
        {"params": groups["embed"], "lr_scale": config.embed_lr_scale, "weight_decay": 0.0},
        {"params": groups["scalar"], "lr_scale": config.scalar_lr_scale, "weight_decay": 0.0},
    ]
    matrix = {"params": groups["matrix"], "lr_scale": 1.0, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        adamw.append(matrix)
    optimizers = [AdamW([g for g in adamw if g["params"]], lr=config.max_lr, betas=tuple(config.betas), fused=True)]
    if config.optimizer == "muon" and matrix["params"]:
        optimizers.append(Muon([matrix], lr=config.max_lr))
    average = Average([p for params in groups.values() for p in params], config.ema) if config.ema else None
    return CombinedOptimizer(*optimizers, average=average)
