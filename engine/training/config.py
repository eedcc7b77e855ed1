"""The settings that every training stage shares; a stage adds its data paths by extending the class."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.distributed import process_group
from utils.config import SWITCH, opt
from utils.errors import UserError


@dataclass
class TrainConfig:
    # the model
    model_name: str = opt("", "architecture: the name of a file's model in model/")
    model: dict = opt({}, "architecture fields, set by --model.key=value")
    max_seq_len: int = opt(0, "tokens a row; 0: the model's default")
    # the machine
    device: str = opt("auto", "where to train; auto finds a GPU", choices=("auto", "cuda", "mps", "cpu"), neutral=True)
    precision: str = opt(
        "auto",
        "compute type; weights stay fp32; auto: bf16 on cuda that has it, else fp32",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    compile: str = opt("auto", "torch.compile the model; auto: on cuda only", choices=SWITCH, neutral=True)
    parallel: str = opt(
        "ddp",
        "of several processes each keeps the whole model (ddp), or a part of it (fsdp), of its "
        "gradients and optimizer state",
        choices=("ddp", "fsdp"),
        neutral=True,
    )
    # the batch
    max_batch_size: int = opt(
        16, "rows in one forward pass of one process; 0: as many as fit the device, found by trying", neutral=True
    )
    accumulation_steps: int = opt(1, "forward passes an optimizer step", neutral=True)
    global_batch_size: int = opt(
        0,
        "rows an optimizer step over all processes; 0: the product of max_batch_size, "
        "accumulation_steps and the number of processes",
    )
    global_batch_tokens: int = opt(
        0,
        "the same in tokens, padding included, rounded down to rows that many numbers of "
        "processes can share; 0: not set",
    )
    batch_ramp_ratio: float = opt(0.0, "share of the steps with a smaller batch: a quarter of it, then half; 0: none")
    # how long
    epochs: float = opt(1.0, "passes over the training data")
    max_steps: int = opt(0, "optimizer steps, instead of epochs; 0: not set")
    max_tokens: int = opt(0, "training tokens, instead of epochs; 0: not set")
    # the recipe
    optimizer: str = opt(
        "muon", "muon: Muon for matrices, AdamW for the rest; adamw: AdamW for all", choices=("muon", "adamw")
    )
    max_lr: float = opt(0.003, "peak learning rate; one scale for both optimizers")
    embed_lr_scale: float = opt(4.0, "learning rate of embeddings and output head, as a multiple of max_lr")
    scalar_lr_scale: float = opt(1.0, "learning rate of norms, biases and other vectors, as a multiple of max_lr")
    min_lr: float = opt(0.0, "learning rate at the end of the decay")
    lr_schedule: str = opt("wsd", "shape of the decay", choices=("cosine", "wsd", "constant"))
    warmup_iters: int = opt(0, "steps of warmup; 0: by warmup_ratio")
    warmup_ratio: float = opt(0.02, "share of the run that is warmup")
    lr_decay_iters: int = opt(0, "step at which min_lr is reached; 0: by lr_decay_ratio")
    lr_decay_ratio: float = opt(1.0, "share of the run after which min_lr is reached")
    wsd_decay_ratio: float = opt(0.4, "wsd: the last share of the way over which the rate falls")
    weight_decay: float = opt(0.1, "decay of matrices, a step: lr x weight_decay")
    betas: tuple[float, float] = opt((0.9, 0.95), "AdamW's moment coefficients")
    grad_clip: float = opt(1.0, "largest gradient norm; 0: no clipping")
    spike_bound: float = opt(
        10.0,
        "skip a step whose loss or gradient norm lies so many robust deviations above the "
        "steps before it; 0: only one that is no number",
    )
    ema: float = opt(
        0.0, "decay a step of a moving average of the weights, which is then evaluated and exported; 0: none"
    )
    z_loss: float = opt(0.0, "weight of the squared log-normaliser of the logits, e.g. 1e-4; 0: none")
    seed: int = opt(1337, "decides initial weights, order of the data, and everything random")
    # what is looked at
    log_interval: int = opt(10, "steps between log lines", neutral=True)
    dry_run: bool = opt(
        False, "measure one step and say what the whole run needs: memory, disk, time; writes nothing", neutral=True
    )
    price_per_hour: float = opt(
        0.0, "what the machine costs, for the cost that --dry_run says; 0: not said", neutral=True
    )
    peak_tflops: float = opt(
        0.0, "what one device can do at best, for MFU; 0: published for the GPU, else measured", neutral=True
    )
    eval_interval: int = opt(250, "steps between held-out evaluations; 0: only at the end", neutral=True)
    eval_batches: int = opt(20, "an evaluation during training reads so many times the rows of a step", neutral=True)
    eval_final_batches: int = opt(0, "the same for the evaluation at the end; 0: all held-out data", neutral=True)
    sample_interval: int = opt(1000, "steps between sample generations; 0: only at the end", neutral=True)
    # files
    tokenizer_path: str = opt("output/tokenizer", "folder of the tokenizer", neutral=True, path=True)
    output_path: str = opt("output", "folder that holds the runs", neutral=True, path=True)
    run_name: str = opt("", "name of the run folder; default: <stage>_<model>", neutral=True)
    save_interval: int = opt(500, "steps between checkpoints; 0: only at the end", neutral=True)
    keep_last: int = opt(2, "newest checkpoints kept", neutral=True)
    keep_every: int = opt(0, "keep the checkpoints at multiples of so many steps as well; 0: none", neutral=True)
    keep_best: bool = opt(
        True, "keep the checkpoint with the lowest held-out loss of those evaluated at their step", neutral=True
    )
    write_run_path: str = opt("", "file that gets the path of the run folder, for scripts", neutral=True, path=True)
    resume: str = opt(
        "auto",
        "auto: go on with an unfinished run of the same settings; never: a new run; "
        "must: fail when there is none; or the path of a run folder",
        neutral=True,
        path=True,
    )

    def __post_init__(self):
        for name in ("accumulation_steps", "log_interval", "eval_batches", "keep_last"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        for name in (
            "max_batch_size",
            "max_seq_len",
            "global_batch_size",
            "global_batch_tokens",
            "max_steps",
            "max_tokens",
            "max_lr",
            "min_lr",
            "warmup_iters",
            "lr_decay_iters",
            "weight_decay",
            "grad_clip",
            "z_loss",
            "spike_bound",
            "eval_interval",
            "eval_final_batches",
            "sample_interval",
            "peak_tflops",
            "price_per_hour",
            "save_interval",
            "keep_every",
            "seed",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"--{name}={getattr(self, name)}: must not be negative")
        for name in ("warmup_ratio", "lr_decay_ratio", "wsd_decay_ratio", "batch_ramp_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name}={getattr(self, name)}: a share of the run lies between 0 and 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas={self.betas}: each must be at least 0 and below 1")
        if self.parallel == "fsdp" and not self.max_batch_size:
            raise UserError(
                "--max_batch_size=0 lets a process run out of memory by itself, and those of "
                "--parallel=fsdp compute together: give a number of rows (--dry_run says what it takes)"
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"--ema={self.ema}: must be at least 0 and below 1, e.g. 0.999")
        if self.global_batch_size and self.global_batch_tokens:
            raise UserError("--global_batch_size and --global_batch_tokens both say how large a step is: drop one")
        if not self.max_batch_size and not (self.global_batch_size or self.global_batch_tokens):
            raise UserError(
                "--max_batch_size=0 takes as many rows as fit the device, and that must not decide the "
                "loss curve: say how large a step is by --global_batch_size or --global_batch_tokens"
            )
        if self.seed >= 2**63:
            raise UserError(f"--seed={self.seed}: must be below 2^63")
        if self.run_name and (Path(self.run_name).name != self.run_name or self.run_name == ".."):
            raise UserError(f"--run_name={self.run_name}: must be the name of a folder in --output_path, not a path")
        if self.epochs <= 0:
            raise UserError(f"--epochs={self.epochs}: must be above 0")
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr={self.min_lr} is above --max_lr={self.max_lr}: lower it")


@dataclass(frozen=True)
class BatchPlan:
    """How the rows of one optimizer step are dealt out: global_rows = micro_rows x accumulation x processes.

    Over the first `ramp_steps` steps the batch is smaller: a quarter of global_rows, and from half of them on, half.
    """

    global_rows: int
    micro_rows: int
    accumulation: int
    ramp_steps: int = 0

    def rows_at(self, step: int) -> int:
        """Rows of step `step` (0-based) over all processes."""
        return self.global_rows // (1 if step >= self.ramp_steps else 2 if 2 * step >= self.ramp_steps else 4)

    def rows_before(self, step: int) -> int:
        """Rows of all steps before `step`, which is where its own begin in the data: nothing has to be remembered."""
        half = -(-self.ramp_steps // 2)
        smaller = min(step, self.ramp_steps)
        return (
            (step - smaller) * self.global_rows
            + max(0, smaller - half) * (self.global_rows // 2)
            + min(smaller, half) * (self.global_rows // 4)
        )

    def micro_at(self, step: int) -> int:
        """Rows of a micro-batch of step `step`."""
        return _even_part(
            self.rows_at(step) // (self.global_rows // (self.micro_rows * self.accumulation)), self.micro_rows
        )


def plan_batch(config: TrainConfig, seq_len: int) -> BatchPlan:
    """The global batch decides the loss curve; processes and micro-batches only decide how it is computed."""
    processes = process_group.world_size()
    rows = config.global_batch_size
    if config.global_batch_tokens:
        rows = max(1, config.global_batch_tokens // seq_len)
        rows -= rows % 2 ** max(0, rows.bit_length() - 4)  # four leading bits: 976 rows are 960, 15 times 64
    rows = rows or config.max_batch_size * config.accumulation_steps * processes
    parts = processes * (4 if config.batch_ramp_ratio else 1)  # a quarter, too, goes to all of them evenly
    if rows % parts:
        raise UserError(
            f"a step of {rows} rows cannot be dealt out evenly to {processes} processes"
            f"{', in quarters for --batch_ramp_ratio' if config.batch_ramp_ratio else ''}: "
            f"choose a --global_batch_size that is a multiple of {parts}"
        )
    share = rows // processes
    micro = _even_part(share, config.max_batch_size or share)
    return BatchPlan(rows, micro, share // micro)


def _even_part(rows: int, at_most: int) -> int:
    """The largest divisor of `rows` that is no larger than `at_most`."""
    return next(part for part in range(min(rows, at_most), 0, -1) if rows % part == 0)


def plan_steps(config: TrainConfig, plan: BatchPlan, rows: int, seq_len: int) -> tuple[int, BatchPlan]:
    """Return (optimizer steps by max_steps, else max_tokens, else epochs, at least one; the plan with its ramp).

    rows: of the training data.
    """
    wanted = config.max_tokens // seq_len if config.max_tokens else int(config.epochs * rows)
    # half of the ramp's steps are a quarter of a step and half of them a half: 3/8 on average
    steps = config.max_steps or max(1, int(wanted / (plan.global_rows * (1 - 0.625 * config.batch_ramp_ratio))))
    return steps, replace(plan, ramp_steps=round(config.batch_ramp_ratio * steps))


def resolve_precision(wanted: str, device: torch.device) -> str:
    """auto -> bf16 on a cuda device that has it, else fp32; UserError for fp16 off cuda."""
    if wanted == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if wanted == "fp16" and device.type != "cuda":
        raise UserError(
            f"--precision=fp16 needs cuda for its loss scaling, and this is {device.type}: use bf16 or fp32"
        )
    return wanted
