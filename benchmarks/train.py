"""Training speed: ours and transformers' implementation of the same model, with the same weights and the same batch.

    python benchmarks/train.py                  dense and MoE, bf16 and fp32, eager and compiled
    python benchmarks/train.py --device=cuda    the default sizes at 512 and 2048 tokens (benchmarks/gpu.sh)
    python benchmarks/train.py --quick          tiny sizes, one round: a smoke test

A step is forward, backward, clipping and AdamW. Ours is the trainer's own (engine/training/step.py); transformers is
used as in its documentation: fp32 weights under autocast, SDPA, fused AdamW, the fastest of its expert
implementations that run on the device. All sides of a table row take turns, step by step, in one process, each row
in another (what the allocator keeps of one model would slow the next); a figure is the median over the rounds.
The losses of both sides are compared before the timing. The FLOPs of `flops_per_token` (3 x forward, attention over
the full square) are shown as a share of the rate of a large matmul of the same type, which takes its turn in the same
rounds; on CUDA as a share of the device's published peak (MFU, engine/planning/mfu.py). A rate or peak that a step
exceeds is measured again, so that no share is above 100%. Peak memory: on CUDA of each
step, else in separate processes. On CUDA last, the dense model on packed sequences of 2048 tokens, compiled, by
flex_attention and by the dense mask. Writes benchmarks/results/train.json (on CUDA train_cuda.json) and prints the
table. A table row is written when it is measured, with the machine; those that a call does not measure stay.
"""

import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from engine.planning import memory  # noqa: E402
from engine.planning.mfu import HardwarePeak, synchronize  # noqa: E402
from engine.runs.run_folder import git_revision  # noqa: E402
from engine.training.config import TrainConfig  # noqa: E402
from engine.training.step import TrainStep  # noqa: E402
from model import get_model_and_args  # noqa: E402
from model.basemodel import BaseModel  # noqa: E402
from model.kernels import attention  # noqa: E402
from utils.atomic import write_text  # noqa: E402
from utils.config import opt, parse  # noqa: E402
from utils.errors import run_script  # noqa: E402
from utils.packages import require_packages  # noqa: E402

DENSE, MOE = "mini_llama3", "mini_deepseekv3"
BOTH = {"dim": 384, "n_layers": 6, "n_heads": 6, "inter_dim": 1024, "vocab_size": 8192}
CPU = {
    DENSE: {**BOTH, "n_kv_heads": 2, "head_dim": 64},
    MOE: {
        **BOTH,
        "q_lora_rank": 192,
        "kv_lora_rank": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_activated_experts": 2,
        "moe_inter_dim": 256,
        "n_dense_layers": 1,
        "n_mtp_layers": 0,
    },
}
CUDA = {DENSE: {}, MOE: {"n_mtp_layers": 0}}  # transformers trains without multi-token prediction
QUICK = {
    DENSE: {**CPU[DENSE], "dim": 48, "n_layers": 2, "head_dim": 16, "inter_dim": 64, "vocab_size": 128},
    MOE: {
        **CPU[MOE],
        "dim": 48,
        "n_layers": 2,
        "inter_dim": 64,
        "vocab_size": 128,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "moe_inter_dim": 16,
    },
}
# transformers' implementations of the experts. On a CPU batched_mm would take 17 GB at these sizes and eight times
# the others' seconds, and its fragmented memory would slow whatever the process does next.
EXPERTS = {"cpu": ("grouped_mm", "eager"), "cuda": ("grouped_mm", "eager", "batched_mm")}


@dataclass
class Config:
    __doc__ = __doc__
    device: str = opt("cpu", "where to train", choices=("cpu", "cuda"))
    models: list[str] = opt([DENSE, MOE], "architectures")
    precisions: list[str] = opt([], "default: bf16 and fp32, on CUDA bf16 alone")
    seq_lens: list[int] = opt([], "tokens per sequence; default: 256, on CUDA 512 and 2048")
    tokens: int = opt(0, "tokens per step; default: 2048, on CUDA 32768")
    rounds: int = opt(15, "measured steps per side")
    compiled: bool = opt(True, "compare the compiled models too")
    memory: bool = opt(True, "measure peak memory: vocabulary 32,000, 16 sequences of 512 tokens")
    peak_tflops: float = opt(0.0, "CUDA: dense peak of the device; 0: as published, see engine/planning/mfu.py")
    quick: bool = opt(False, "tiny sizes and one round, to see that everything runs")
    results: str = opt("", "where the figures go")


Step = Callable[[], float]  # takes an optimizer step and returns its loss


def our_model(name: str, sizes: dict, seq_len: int) -> BaseModel:
    Model, ModelArgs = get_model_and_args(name)
    torch.manual_seed(0)
    return Model(ModelArgs(max_seq_len=seq_len, **sizes))


def their_model(ours: BaseModel, experts: str) -> Any:
    """transformers' model with the weights of ours."""
    from transformers import AutoModelForCausalLM

    config, tensors = ours.to_hf()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
        ).train()


def our_step(model: BaseModel, precision: str, compiled: bool, batch: dict, device: torch.device) -> Step:
    """A function that takes one step as the trainer takes it, and returns the loss."""
    config = TrainConfig(
        optimizer="adamw", precision=precision, compile="true" if compiled else "false", max_lr=3e-4, embed_lr_scale=1.0
    )
    trainer = TrainStep(model.to(device).train(), config, device)
    trainer.optimizer.set_lr(config.max_lr)

    def step() -> float:
        values = trainer.gradients([batch], weights=[1.0], seeds=[0], share=1.0)
        norm = trainer.clip()
        loss, _ = torch.stack([values["loss"], norm]).tolist()
        trainer.update(norm.isfinite())
        model.after_step({name: value for name, value in values.items() if name != "loss"})
        return loss

    return step


def their_step(model: Any, precision: str, compiled: bool, batch: dict, device: torch.device) -> Step:
    """The same for transformers, written as its users write it."""
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model
    ids, labels = batch["input_ids"].to(device), batch["input_ids"].to(device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss, _ = torch.stack([loss.detach(), norm]).tolist()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def make_batch(vocab_size: int, batch_size: int, seq_len: int) -> dict:
    """Random tokens; as transformers shifts its labels itself, the last position has no target."""
    ids = torch.randint(0, vocab_size, (batch_size, seq_len), generator=torch.Generator().manual_seed(1))
    targets = torch.cat((ids[:, 1:], torch.full((batch_size, 1), -100)), dim=1)
    return {"input_ids": ids, "targets": targets}


def make_packed_batch(vocab_size: int, batch_size: int, seq_len: int) -> dict:
    """Random tokens in random documents, a quarter of a sequence long on average."""
    batch = make_batch(vocab_size, batch_size, seq_len)
    starts = torch.rand(batch_size, seq_len, generator=torch.Generator().manual_seed(2)) < 4 / seq_len
    return {**batch, "doc_ids": starts.cumsum(dim=1)}


def no_flex(x: torch.Tensor) -> int:
    return 0


def with_dense_mask(step: Step) -> Step:
    """`step` with the dense mask, as where flex_attention supports no head dim; each form is compiled once."""

    def dense() -> float:
        widest = attention.widest_flex_head
        attention.widest_flex_head = no_flex
        try:
            return step()
        finally:
            attention.widest_flex_head = widest

    return dense


def matmul_step(precision: str, device: torch.device, size: int = 2048) -> tuple[Step, int]:
    """Four matmuls, and their FLOPs."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)

    def step() -> float:
        for _ in range(4):
            torch.mm(a, b.T, out=out)
        return 0.0

    return step, 4 * 2 * size**3


def timed(step: Step, device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def best_experts(ours: BaseModel, precision: str, batch: dict, device: torch.device) -> tuple[str, dict]:
    """The fastest of transformers' expert implementations here, and the seconds of each (None: it does not run)."""
    seconds: dict[str, float | None] = {}
    for experts in EXPERTS[device.type]:
        try:
            step = their_step(their_model(ours, experts), precision, False, batch, device)
            first = timed(step, device)
            fastest = min([first, *filter(None, seconds.values())])
            # beyond 3 times the fastest it would not be the fastest when warm
            seconds[experts] = min(timed(step, device) for _ in range(2)) if first < 3 * fastest else first
        except Exception as error:  # whatever it is, a user would choose another
            print(f"transformers' {experts} does not run here: {str(error).splitlines()[0]}", file=sys.stderr)
            seconds[experts] = None
    return min((value, experts) for experts, value in seconds.items() if value)[1], seconds


def compare(config: Config, name: str, precision: str, sizes: dict, seq_len: int, tokens: int) -> dict:
    """The figures of one model at one precision and length."""
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    batch = make_batch(sizes.get("vocab_size", 32000), tokens // seq_len, seq_len)
    model = our_model(name, sizes, seq_len)
    experts, tried = ("eager", {}) if name == DENSE else best_experts(model, precision, batch, device)
    flops = model.flops_per_token(seq_len)
    matmul, matmul_flops = matmul_step(precision, device, 256 if config.quick else 2048)
    steps = {"matmul": matmul}
    for compiled in (False, True) if config.compiled else (False,):
        how = "compiled" if compiled else "eager"
        model = our_model(name, sizes, seq_len)
        steps[f"theirs {how}"] = their_step(their_model(model, experts), precision, compiled, batch, device)
        steps[f"ours {how}"] = our_step(model, precision, compiled, batch, device)
    peaks: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    for side, step in steps.items():  # warm: the first step compiles and allocates
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        losses[side] = [step() for _ in range(3)]
        if device.type == "cuda":
            peaks[side] = (torch.cuda.max_memory_allocated() - before) / 2**20
    for side, loss in losses.items():
        want = losses["theirs eager"][0]
        if side != "matmul" and abs(loss[0] - want) > 0.01 * want:
            raise RuntimeError(f"{name} {precision}: the loss of {side} is {loss[0]:.4f}, of theirs eager {want:.4f}")
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(config.rounds):
        for side, step in steps.items():
            seconds[side].append(timed(step, device))
    figures: dict[str, Any] = {
        "model": name,
        "precision": precision,
        "seq_len": seq_len,
        "rows": tokens // seq_len,
        "sizes": sizes,
        "gflops_per_token": flops / 1e9,
        "first_losses": {s: v[0] for s, v in losses.items() if s != "matmul"},
        "experts": experts,
        "experts_seconds": tried,
        "seconds": seconds,
        "matmul_gflops": matmul_flops / statistics.median(seconds.pop("matmul")) / 1e9,
        "memory_mib": peaks,
    }
    figures["tokens_per_s"] = {side: tokens / statistics.median(s) for side, s in seconds.items()}
    if device.type == "cuda":
        peak = HardwarePeak(device, precision, config.peak_tflops)
    else:
        peak = HardwarePeak(device, precision, figures["matmul_gflops"] / 1e3, "matmuls in turns with the steps")
    peak.share(flops, max(figures["tokens_per_s"].values()), 1)  # the fastest first: all shares are of one peak
    figures["flops_share"] = {side: peak.share(flops, rate, 1) for side, rate in figures["tokens_per_s"].items()}
    figures["peak"] = str(peak)
    for how in ("eager", "compiled") if config.compiled else ("eager",):
        figures[f"ratio_{how}"] = statistics.median(
            theirs / ours for theirs, ours in zip(seconds[f"theirs {how}"], seconds[f"ours {how}"])
        )
    return figures


def compare_packed(config: Config, name: str, precision: str, sizes: dict, seq_len: int, tokens: int) -> dict:
    """Our model on packed sequences, by flex_attention where it is used, and by the dense mask."""
    device = torch.device(config.device)
    batch = make_packed_batch(sizes.get("vocab_size", 32000), tokens // seq_len, seq_len)
    steps = {
        side: our_step(our_model(name, sizes, seq_len), precision, config.compiled, batch, device)
        for side in ("flex", "dense mask")
    }
    steps["dense mask"] = with_dense_mask(steps["dense mask"])
    losses = {side: [step() for _ in range(3)][0] for side, step in steps.items()}
    if abs(losses["flex"] - losses["dense mask"]) > 0.01 * losses["dense mask"]:
        raise RuntimeError(f"{name} {precision}, packed: the losses differ: {losses}")
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(config.rounds):
        for side, step in steps.items():
            seconds[side].append(timed(step, device))
    ratios = [dense / flex for dense, flex in zip(seconds["dense mask"], seconds["flex"])]
    return {
        "model": name,
        "precision": precision,
        "seq_len": seq_len,
        "rows": tokens // seq_len,
        "sizes": sizes,
        "first_losses": losses,
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "tokens_per_s": {side: tokens / statistics.median(s) for side, s in seconds.items()},
    }


def peak_memory(config: Config, name: str, side: str) -> float:
    """MiB that two steps at a vocabulary of 32,000 with 16 sequences of 512 tokens need beyond model and batch."""
    sizes = {**(QUICK if config.quick else CPU)[name], "vocab_size": 1024 if config.quick else 32000}
    seq_len, batch_size = (64, 2) if config.quick else (512, 16)
    batch = make_batch(sizes["vocab_size"], batch_size, seq_len)
    device = torch.device("cpu")
    model = our_model(name, sizes, seq_len)
    if side == "ours":
        step = our_step(model, "bf16", False, batch, device)
    else:
        experts = "eager" if name == DENSE else EXPERTS["cpu"][0]
        step = their_step(their_model(model, experts), "bf16", False, batch, device)
    gc.collect()
    warm_up(device)
    memory.reset_peak_memory(device)
    before = memory.allocated(device)
    for _ in range(2):
        step()
    return (memory.peak_memory(device) - before) / 2**20


def warm_up(device: torch.device) -> None:
    """Let the libraries allocate what they keep."""
    a = torch.randn(64, 64, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        (a @ a).sum().backward()


def memory_of_both(config: Config, name: str) -> dict:
    """{"ours", "theirs": MiB, "share"}, each side measured in its own process."""
    figures = {side: alone(peak_memory, config, name, side) for side in ("ours", "theirs")}
    return {**figures, "share": figures["ours"] / figures["theirs"]}


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of this file in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *args).result()


def table(results: dict) -> str:
    """Markdown, one row per model, precision and length; 0: not measured."""
    lines = [
        "| | transformers eager | compiled | ours eager | compiled | ratio eager | compiled | FLOPs: share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results["speed"].items():
        sides = [
            f"{row['tokens_per_s'].get(f'{side} {how}', 0):,.0f}"
            for side in ("theirs", "ours")
            for how in ("eager", "compiled")
        ]
        ratios = [f"{row.get(f'ratio_{how}', 0):.2f}" for how in ("eager", "compiled")]
        best = max(value for side, value in row["flops_share"].items() if side.startswith("ours"))
        lines.append(f"| {name} | {' | '.join(sides + ratios)} | {best:.0%} |")
    for name, figures in results["memory"].items():
        lines.append(
            f"\npeak memory of {name}: ours {figures['ours']:,.0f} MiB, transformers "
            f"{figures['theirs']:,.0f} MiB: {figures['share']:.0%}"
        )
    for name, row in results.get("packed", {}).items():
        lines.append(
            f"\npacked sequences, {name}: flex_attention {row['tokens_per_s']['flex']:,.0f} tokens/s, dense mask "
            f"{row['tokens_per_s']['dense mask']:,.0f}: {row['ratio']:.2f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, argv)
    cuda = config.device == "cuda"
    sizes = QUICK if config.quick else CUDA if cuda else CPU
    seq_lens = config.seq_lens or ([32] if config.quick else [512, 2048] if cuda else [256])
    tokens = config.tokens or (64 if config.quick else 32768 if cuda else 2048)
    config.rounds = 1 if config.quick else config.rounds
    require_packages("transformers", change="pip install -e .[test]")
    about = {
        "date": str(date.today()),
        "command": " ".join(["python benchmarks/train.py", *(argv or sys.argv[1:])]),
        "device": config.device,
        "processor": torch.cuda.get_device_name() if cuda else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git_revision(),
    }
    import transformers

    about["transformers"] = transformers.__version__
    path = Path(config.results or ROOT / f"benchmarks/results/train{'_cuda' if cuda else ''}.json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"speed": {}, "memory": {}}

    def keep(what: str, name: str, figures: dict) -> None:
        results.setdefault(what, {})[name] = {**figures, "about": about}
        if not config.quick or config.results:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(results, indent=1) + "\n")

    for name in config.models:
        for precision in config.precisions or (["bf16"] if cuda else ["bf16", "fp32"]):
            for seq_len in seq_lens:
                figures = alone(compare, config, name, precision, sizes[name], seq_len, tokens)
                keep("speed", f"{name}, {precision}, {figures['rows']} x {seq_len}", figures)
        if config.memory and not cuda:
            keep("memory", name, memory_of_both(config, name))
    if DENSE in config.models and (config.quick or cuda and seq_lens[-1] >= 2048):
        figures = alone(compare_packed, config, DENSE, "bf16", sizes[DENSE], seq_lens[-1], tokens)
        keep("packed", f"{DENSE}, bf16, {figures['rows']} x {seq_lens[-1]}", figures)
    print(table(results))


def cpu_name() -> str:
    try:
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        return names[0]
    except (OSError, IndexError):
        return platform.processor()


if __name__ == "__main__":
    run_script(main)
