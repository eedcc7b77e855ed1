"""The settings that every training stage shares; a stage adds its data paths by extending the class."""

import time
from dataclasses import dataclass
from pathlib import Path

from utils.config import SWITCH, check_bounds, opt
from utils.errors import UserError


@dataclass
class TrainConfig:
    model_name: str = opt("", "architecture: the name of a file's model in model/", group="Model")
    model: dict = opt({}, "architecture fields, set by --model.key=value")
    max_seq_len: int = opt(0, "tokens per sequence; 0: the model's default", ge=0)
    device: str = opt(
        "auto",
        "where to train; auto finds a GPU",
        choices=("auto", "cuda", "mps", "cpu"),
        neutral=True,
        group="Machine",
    )
    precision: str = opt(
        "auto",
        "compute dtype; weights stay fp32; auto: bf16 on CUDA that has it and on a CPU that multiplies it faster, else "
        "fp32",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    compile: str = opt("auto", "torch.compile the model; auto: on CUDA only", choices=SWITCH, neutral=True)
    parallel: str = opt(
        "ddp",
        "with several processes: ddp replicates the model; fsdp shards parameters, gradients and optimizer state",
        choices=("ddp", "fsdp"),
        neutral=True,
    )
    max_batch_size: int = opt(
        16,
        "sequences per micro-batch: one forward pass of one process; 0: the largest that fits the device, found by "
        "trying",
        neutral=True,
        ge=0,
        group="Batch",
    )
    accumulation_steps: int = opt(1, "micro-batches per optimizer step", neutral=True, ge=1)
    global_batch_size: int = opt(
        0,
        "sequences per optimizer step over all processes; 0: max_batch_size x accumulation_steps x processes",
        ge=0,
    )
    global_batch_tokens: int = opt(
        0,
        "the same in tokens, padding included, rounded down to a number of sequences that divides well over "
        "processes; 0: not set",
        ge=0,
    )
    batch_ramp_ratio: float = opt(
        0.0, "share of the steps with a smaller batch: a quarter of it, then half; 0: none", ge=0, le=1
    )
    epochs: float = opt(1.0, "passes over the training data", gt=0, group="Length of the run")
    max_steps: int = opt(0, "optimizer steps, instead of epochs; 0: not set", ge=0)
    max_tokens: int = opt(0, "training tokens, instead of epochs; 0: not set", ge=0)
    max_minutes: float = opt(
        0.0,
        "minutes that the command may take, instead of epochs: measured steps turn them into max_steps; a smaller "
        "max_steps or max_tokens counts too; 0: not set",
        neutral=True,  # the loop adds it to the run's fingerprint, in place of the steps
        ge=0,
        le=1e6,
    )
    optimizer: str = opt(
        "muon",
        "muon: Muon for matrices, AdamW for the rest; adamw: AdamW for all",
        choices=("muon", "adamw"),
        group="Recipe",
    )
    max_lr: float = opt(0.003, "peak learning rate; one scale for both optimizers", ge=0)
    embed_lr_scale: float = opt(4.0, "learning rate of embeddings and output head, as a multiple of max_lr")
    scalar_lr_scale: float = opt(1.0, "learning rate of norms, biases and other vectors, as a multiple of max_lr")
    min_lr: float = opt(0.0, "learning rate at the end of the decay", ge=0)
    lr_schedule: str = opt("wsd", "shape of the decay", choices=("cosine", "wsd", "constant"))
    warmup_iters: int = opt(0, "warmup steps; 0: by warmup_ratio", ge=0)
    warmup_ratio: float = opt(0.02, "share of the run that is warmup", ge=0, le=1)
    lr_decay_iters: int = opt(0, "step at which min_lr is reached; 0: by lr_decay_ratio", ge=0)
    lr_decay_ratio: float = opt(1.0, "share of the run after which min_lr is reached", ge=0, le=1)
    wsd_decay_ratio: float = opt(0.4, "wsd: the last share of the run, over which the learning rate decays", ge=0, le=1)
    weight_decay: float = opt(0.1, "decoupled decay of matrices; per step: lr x weight_decay", ge=0)
    betas: tuple[float, float] = opt((0.9, 0.95), "AdamW's moment coefficients", ge=0, lt=1)
    grad_clip: float = opt(1.0, "largest gradient norm; 0: no clipping", ge=0)
    spike_bound: float = opt(
        10.0,
        "skip a step whose loss or gradient norm is more than this many robust standard deviations above the recent "
        "steps; 0: skip non-finite ones only",
        ge=0,
    )
    ema: float = opt(
        0.0,
        "decay per step of an exponential moving average of the weights, which is then evaluated and exported; "
        "0: none, usual: 0.999",
        ge=0,
        lt=1,
    )
    z_loss: float = opt(0.0, "weight of the squared log-normaliser of the logits, e.g. 1e-4; 0: none", ge=0)
    seed: int = opt(1337, "seed of initial weights, data order and everything random", ge=0, lt=2**63)
    log_interval: int = opt(10, "steps between log lines", neutral=True, ge=1, group="Logging and evaluation")
    dry_run: bool = opt(
        False, "measure one step and report what the run needs: memory, disk, time; writes nothing", neutral=True
    )
    price_per_hour: float = opt(
        0.0, "price of the machine, for the cost that --dry_run reports; 0: no cost", neutral=True, ge=0
    )
    peak_tflops: float = opt(
        0.0, "peak of one device, for MFU; 0: the published one of the GPU, else measured", neutral=True, ge=0
    )
    eval_interval: int = opt(250, "steps between held-out evaluations; 0: only at the end", neutral=True, ge=0)
    eval_batches: int = opt(20, "global batches per evaluation during training", neutral=True, ge=1)
    eval_final_batches: int = opt(0, "the same for the final evaluation; 0: all held-out data", neutral=True, ge=0)
    sample_interval: int = opt(1000, "steps between sample generations; 0: only at the end", neutral=True, ge=0)
    tokenizer_path: str = opt("output/tokenizer", "folder of the tokenizer", neutral=True, path=True, group="Files")
    output_path: str = opt("output", "folder that holds the runs", neutral=True, path=True)
    run_name: str = opt("", "name of the run folder; default: <stage>_<model>", neutral=True)
    save_interval: int = opt(500, "steps between checkpoints; 0: only at the end", neutral=True, ge=0)
    keep_last: int = opt(2, "newest checkpoints kept", neutral=True, ge=1)
    keep_every: int = opt(0, "keep checkpoints at multiples of this many steps as well; 0: none", neutral=True, ge=0)
    keep_best: bool = opt(
        True, "keep the checkpoint with the lowest held-out loss of those evaluated at their step", neutral=True
    )
    write_run_path: str = opt("", "file that gets the path of the run folder, for scripts", neutral=True, path=True)
    resume: str = opt(
        "auto",
        "auto: resume an unfinished run of the same settings; never: a new run; "
        "must: fail when there is none; or the path of a run folder",
        neutral=True,
        path=True,
    )

    def __post_init__(self) -> None:
        self.started = time.monotonic()  # from here --max_minutes counts
        check_bounds(self)
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr={self.min_lr} is above --max_lr={self.max_lr}: lower it")
        if self.run_name and (Path(self.run_name).name != self.run_name or self.run_name == ".."):
            raise UserError(f"--run_name={self.run_name}: must be the name of a folder in --output_path, not a path")
        if self.global_batch_size and self.global_batch_tokens:
            raise UserError("--global_batch_size and --global_batch_tokens both set the global batch: drop one")
        if self.max_batch_size:
            return
        if self.parallel == "fsdp":
            raise UserError(
                "--max_batch_size=0 lets one process run out of memory by itself, and those of --parallel=fsdp "
                "compute together: give a number of sequences (--dry_run reports the memory it takes)"
            )
        if not (self.global_batch_size or self.global_batch_tokens):
            raise UserError(
                "--max_batch_size=0 takes as many sequences as fit the device, and that must not decide the "
                "loss curve: set the global batch by --global_batch_size or --global_batch_tokens"
            )


@dataclass
class FineTuneConfig(TrainConfig):
    """The settings of a stage that starts from a pretrained run."""

    init_from: str = opt(
        "",
        "run folder of the pretrained model; default: the newest of --model_name",
        neutral=True,
        path=True,
        group="Data",
    )
