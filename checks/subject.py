"""What a check works on: an architecture so small that it runs in milliseconds, with weights that show mistakes."""

import dataclasses

import torch

from model import get_model_and_args

# Small values for the names of DESIGN's field list. Uneven where a mix-up of two sizes should show.
TINY = {
    "vocab_size": 97, "max_seq_len": 24, "dim": 32, "n_layers": 3, "n_dense_layers": 1, "n_heads": 4, "n_kv_heads": 2,
    "head_dim": 8, "inter_dim": 48, "moe_inter_dim": 20, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 6, "n_shared_experts": 1, "n_activated_experts": 2,
    "n_expert_groups": 3, "n_limited_groups": 2, "window_size": 8, "conv_size": 3, "linear_n_k_heads": 2,
    "linear_n_v_heads": 4,
}  # fmt: skip


class CheckFailed(AssertionError):
    """The architecture is wrong: the message says what was seen, with figures."""


class NotApplicable(Exception):
    """The architecture does not declare what this check is about."""


def require(condition, message):
    """Raise `CheckFailed(message)` unless `condition` holds."""
    if not condition:
        raise CheckFailed(message)


def require_close(got, want, what, tolerance=1e-4):
    """Raise `CheckFailed` when two tensors differ by more than `tolerance`, relative to the larger scale of `want`."""
    require(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    error = (got - want).abs().max().item() if got.numel() else 0.0
    bound = tolerance * max(1.0, want.abs().max().item() if want.numel() else 0.0)
    require(error <= bound, f"{what}: differs by {error:.3g} (allowed {bound:.3g})")


def tiny_args(ModelArgs):
    """Return small args: `ModelArgs.tiny()` when the author gives one, else the usual names at their small values."""
    if hasattr(ModelArgs, "tiny"):
        return ModelArgs.tiny()
    names = {field.name for field in dataclasses.fields(ModelArgs)}
    return ModelArgs(**{name: value for name, value in TINY.items() if name in names})


class Subject:
    """One architecture under check: `Model`, its tiny `args`, and ways to make models and inputs from fixed seeds."""

    def __init__(self, name):
        self.name = name
        self.Model, self.ModelArgs = get_model_and_args(name)
        self.args = tiny_args(self.ModelArgs)

    def build(self, seed=0, sharp=True):
        """Return a model in eval mode. `sharp`: weights of unit gain instead of the small initial ones, whose outputs
        hardly depend on the input, so that a leak or a drift would hide in rounding."""
        torch.manual_seed(seed)
        model = self.Model(self.args).eval()
        if sharp:
            with torch.no_grad():
                for param in model.parameters():
                    if param.ndim >= 2:
                        param.normal_(std=param.shape[-1] ** -0.5)
                    else:
                        param.add_(torch.randn_like(param), alpha=0.1)
        return model

    def tokens(self, rows=3, length=None, seed=1):
        """Return random token ids (rows, length or max_seq_len)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.args.vocab_size, (rows, length or self.args.max_seq_len), generator=generator)

    def needs(self, parameter):
        """Skip the check unless the model's forward accepts `parameter`."""
        if not self.Model.accepts(parameter):
            raise NotApplicable(f"forward of {self.name} does not accept {parameter}")
