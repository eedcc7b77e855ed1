"""The arithmetic of an optimizer step: compute type, forward and backward, clipping, update."""

from contextlib import contextmanager, nullcontext

import torch

from engine.data.loader import to_device
from engine.distributed.fsdp import full_tensor, is_sharded
from engine.training.config import resolve_precision
from engine.training.optim import build_optimizer
from engine.training.validate_forward import checked
from utils.errors import UserError


def wants_compile(config, device: torch.device) -> bool:
    return config.compile == "true" or (config.compile == "auto" and device.type == "cuda")


class TrainStep:
    """Takes the steps of `model` on `device` as `config` (a TrainConfig) says; what the steps are of, it does not know.

    Attributes for the loop around it: optimizer, parameters (all that it moves), scaler (of fp16, else idle),
    precision ("fp32", "bf16" or "fp16"), compiled (bool), forward (the model, compiled or not).
    """

    def __init__(self, model, config, device: torch.device):
        self.device, self.grad_clip = device, config.grad_clip
        self.precision = resolve_precision(config.precision, device)
        self.optimizer = build_optimizer(model, config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.compiled, sharded = wants_compile(config, device), is_sharded(model)
        self.forward = torch.compile(model, dynamic=False) if self.compiled and not sharded else model  # layer by layer
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        low = self.precision == "bf16" and not sharded  # whole matrices do not live long enough there
        self.weights = LowWeights(model.param_groups()["matrix"] if low else [], self.dtype)
        model.z_loss = config.z_loss
        self._train_forward = checked(self.forward, type(model), config.z_loss)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    @contextmanager
    def compute(self):
        """A context in which a forward pass runs in the compute type."""
        with self.weights.lowered(), self.autocast():
            yield

    def gradients(self, batches, weights: list[float], seeds: list[int], share: float) -> dict[str, torch.Tensor]:
        """Add the gradients of all micro-batches to .grad; return their losses and other_vars, summed.

        batches: keyword arguments of forward, as the loader makes them. weights: the share of each micro-batch in the
        step's loss, by which all losses are summed. share: of each micro-batch in all other values.
        """
        values: dict[str, torch.Tensor] = {}
        with self.weights.lowered():
            for batch, weight, seed in zip(batches, weights, seeds, strict=True):
                torch.manual_seed(seed)
                with self.autocast(), self.weights.explained():
                    _, loss, other_vars = self._train_forward(**to_device(batch, self.device))
                self.scaler.scale(loss * weight).backward()
                self.weights.collect()
                for name, value in {"loss": loss, **other_vars}.items():
                    value = value.detach().float() * (weight if name.split("/")[0] == "loss" else share)
                    values[name] = values[name] + value if name in values else value
        return values

    def clip(self) -> torch.Tensor:
        """Scale the gradients down to the largest norm allowed; return the norm that they had, 0-d fp32."""
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
        return norm.float()

    def update(self, good: torch.Tensor) -> None:
        """Move the parameters by their gradients where `good`, 0-d bool, is true; forget the gradients.

        fp16: its scale goes down by the gradients that are no numbers, which no good step has.
        """
        self.optimizer.step(good)
        self.scaler.update()
        self.optimizer.zero_grad()


class LowWeights:
    """Copies of `params` in a smaller type, made once a step: autocast alone would make one for every use.

    The parameters themselves stay fp32: outside `lowered` nothing has changed, and gradients are fp32 too. Embeddings
    and vectors are better left out: an embedding adds up the gradients of all uses of a token, which needs the digits.
    """

    def __init__(self, params, dtype):
        self.params = list(params)
        self.copies = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in self.params]
        self.sums = [None] * len(self.params)

    @contextmanager
    def lowered(self):
        """A context in which the parameters are their copies; `collect` after each backward pass in it."""
        if not self.params:
            yield
            return
        full = [p.data for p in self.params]
        torch._foreach_copy_(self.copies, full)
        self.sums = [p.grad for p in self.params]
        try:
            for p, copy in zip(self.params, self.copies):
                p.grad, p.data = None, copy
            yield
        finally:
            for p, data, total in zip(self.params, full, self.sums):
                p.grad = None
                p.data, p.grad = data, total

    @contextmanager
    def explained(self):
        """A context in which a matrix of the smaller type that meets fp32 numbers where autocast is off is a UserError.

        Autocast alone leaves fp32 weights fp32 there, so an author has no other way to learn of it.
        """
        try:
            yield
        except RuntimeError as error:
            if not self.params or "same dtype" not in str(error):
                raise
            raise UserError(
                f"forward fails because matrices are {self.copies[0].dtype} in training ({error}): where "
                "it computes in fp32 it must say weight.float(), or param_groups must count that weight "
                "as scalar; or use --precision=fp32"
            ) from error

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of one backward pass to the fp32 sums."""
        for i, p in enumerate(self.params):
            if p.grad is not None:
                self.sums[i] = p.grad.float() if self.sums[i] is None else self.sums[i].add_(p.grad)
                p.grad = None
