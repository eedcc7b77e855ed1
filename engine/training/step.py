"""The arithmetic of an optimizer step: compute dtype, forward and backward, clipping, update."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from engine.data.loader import StepBatches, to_device
from engine.distributed import process_group
from engine.distributed.fsdp import full_tensor, is_sharded
from engine.training.config import TrainConfig
from engine.training.optim import build_optimizer
from engine.training.precision import LowPrecisionCopies, resolve_precision
from engine.training.validate_forward import checked
from model.basemodel import BaseModel


def wants_compile(config: TrainConfig, device: torch.device) -> bool:
    return config.compile == "true" or (config.compile == "auto" and device.type == "cuda")


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """The seed of everything random in micro-batch `index` of step `step` (0-based), below 2^63.

    index: of the micro-batch in the step over all processes, so that it does not matter which process computes it.
    """
    return ((seed * 1_000_003 + step) * 65536 + index) % 2**63


class TrainStep:
    """Runs the optimizer steps of `model` on `device`; independent of the data and the loop.

    Attributes: optimizer; parameters (all that it updates); scaler (of fp16, else disabled); precision ("fp32", "bf16"
    or "fp16"); compiled (bool); forward (the model, compiled or not).
    """

    def __init__(self, model: BaseModel, config: TrainConfig, device: torch.device) -> None:
        self.device = device
        self.grad_clip = config.grad_clip
        self.precision = resolve_precision(config.precision, device, model)
        self.reset(model, config)
        self.compiled = wants_compile(config, device)
        self.sharded = is_sharded(model)
        # fsdp.shard has compiled a sharded model layer by layer
        self.forward = torch.compile(model, dynamic=False) if self.compiled and not self.sharded else model
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        # a sharded model gathers each matrix only while it is used: copies for the full step would defeat that
        casts = self.precision == "bf16" and not self.sharded
        self.low_precision = LowPrecisionCopies(model.param_groups()["matrix"] if casts else [], self.dtype)
        model.z_loss = config.z_loss
        self._train_forward = checked(self.forward, type(model), config.z_loss)

    def reset(self, model: BaseModel, config: TrainConfig) -> None:
        """Go back to the first step of `model`: no optimizer state, no gradients, the initial loss scale."""
        self.optimizer = build_optimizer(model, config)
        self.parameters: list[torch.nn.Parameter] = [p for g in self.optimizer.param_groups for p in g["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.optimizer.zero_grad()

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    @contextmanager
    def compute_dtype(self) -> Iterator[None]:
        """A context in which a forward pass runs in the compute dtype."""
        with self.low_precision.cast_weights(), self.autocast():
            yield

    def gradients(
        self, batches: list[dict[str, torch.Tensor]], weights: Sequence[float], seeds: Sequence[int], share: float
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of all micro-batches to .grad; return their losses and other_vars, summed.

        batches: keyword arguments of forward, as the loader makes them. weights: of each micro-batch in the step's
        loss. seeds: of each micro-batch's random numbers. share: the weight of each micro-batch in all other values.

        A model's loss is the mean over the valid targets of its micro-batch (`lm_loss`). The loader counts those
        targets, the loop divides by the count of the full step over all processes, and the quotient is the weight
        here. So the gradient is that of the mean over all targets of the step, however it is divided.
        """
        values: dict[str, torch.Tensor] = {}
        with self.low_precision.cast_weights():
            for batch, weight, seed in zip(batches, weights, seeds, strict=True):
                torch.manual_seed(seed)
                with self.autocast(), self.low_precision.explain_dtype_errors():
                    _, loss, other_vars = self._train_forward(**to_device(batch, self.device))
                self.scaler.scale(loss * weight).backward()
                self.low_precision.collect()
                for name, value in {"loss": loss, **other_vars}.items():
                    value = value.detach().float() * (weight if name.split("/")[0] == "loss" else share)
                    values[name] = values[name] + value if name in values else value
        return values

    def accumulate(self, work: StepBatches, targets: float, seed: int, step: int) -> dict[str, torch.Tensor]:
        """Forward and backward of a full step: gradients and values summed over micro-batches and processes.

        targets: valid targets of the step over all processes. seed, step: for the random numbers.
        """
        rank, processes = process_group.rank(), process_group.world_size()
        values = self.gradients(
            work.batches,
            weights=[count / max(1, targets) for count in work.targets],
            seeds=[micro_batch_seed(seed, step, rank + i * processes) for i in range(len(work.batches))],
            share=1 / (len(work.batches) * processes),
        )
        if not self.sharded:  # the backward pass of a sharded model has summed them
            process_group.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]  # it reads param_groups alone
        return process_group.sum_tensors(values)

    def clip(self) -> torch.Tensor:
        """Scale the gradients down to norm `grad_clip`; return the norm they had, 0-d fp32."""
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
        return norm.float()

    def update(self, good: torch.Tensor) -> None:
        """Update the parameters where `good`, 0-d bool, is true; clear the gradients.

        fp16: the loss scale is lowered when a gradient is non-finite, which never holds for a good step.
        """
        self.optimizer.step(good)
        self.scaler.update()
        self.optimizer.zero_grad()
