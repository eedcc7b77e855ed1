"""Decoding speed: tokens per second, compared with transformers' `generate` and, for the dense model, llama.cpp.

    pip install -e .[test,bench]
    python benchmarks/decode.py              dense and MoE, one request and 8 concurrent ones
    python benchmarks/decode.py --models mini_llama3 --rows 1      one case; the figures of the others stay in the file
    python benchmarks/decode.py --quick      few tokens, one round: a smoke test

The same random weights everywhere, greedy, a prompt of 16 tokens. All take turns in one process, and a figure is the
median over the rounds: seconds from a call to the last token, seen from Python. Before it is timed, each contender's
first logits are compared with ours. llama.cpp is the prebuilt wheel of xllamacpp, which uses AVX2 at most; on x86 with
AVX-512 `pip install --no-binary=xllamacpp xllamacpp` builds a faster one. The result has what it uses. Further figures:
the share of the rate that the memory bandwidth measured here allows when the active weights are read once per token,
and the time of a decode step by its position, ours and transformers' in turns. Writes benchmarks/results/decode.json
and prints the tables.
"""

import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from engine.inference.generate import generate  # noqa: E402
from model import BaseModel, get_model_and_args  # noqa: E402
from model.kernels.prepare import prepare_for_decoding  # noqa: E402
from utils.config import opt, parse  # noqa: E402
from utils.errors import run_script  # noqa: E402
from utils.packages import require_packages  # noqa: E402

DENSE = "mini_llama3"
MOE = "mini_deepseekv3"
SIZES: dict[str, dict[str, Any]] = {
    DENSE: dict(n_kv_heads=2, head_dim=64, inter_dim=1024),
    MOE: dict(
        n_dense_layers=1,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        inter_dim=1024,
        moe_inter_dim=256,
        n_routed_experts=8,
        n_shared_experts=1,
        n_activated_experts=2,
        n_mtp_layers=0,
    ),
}
SHARED: dict[str, Any] = dict(vocab_size=8192, dim=384, n_layers=6, n_heads=6)
PROMPT = 16
POSITIONS = (64, 512, 1024, 2048, 4000)
NEXT = torch.tensor([[5]])  # the token of a decode step there
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}
TOKENIZER: Any = SimpleNamespace(stop_ids=())

Answer = Callable[[list[list[int]], int], list[list[int]]]  # prompts, number of tokens -> answers
Logits = Callable[[list[int]], torch.Tensor]  # a prompt -> the logits of its last token (V,), fp32
Contender = tuple[Answer, Logits]


@dataclass
class Config:
    __doc__ = __doc__
    models: list[str] = opt([DENSE, MOE], "architectures")
    rows: list[int] = opt([1, 8], "concurrent requests")
    tokens: int = opt(60, "of an answer")
    rounds: int = opt(5, "measured answers per contender")
    llama_cpp: bool = opt(True, "compare llama.cpp where it can hold the model")
    positions: bool = opt(True, "time a decode step at several positions")
    quick: bool = opt(False, "12 tokens, one round")
    results: str = opt(str(ROOT / "benchmarks/results/decode.json"), "file of the figures")


def our_model(name: str, precision: str, max_seq_len: int = 512) -> BaseModel:
    """Return one of the models with random weights, for int8 in bf16: `prepare_for_decoding` quantizes them."""
    Model, ModelArgs = get_model_and_args(name)
    torch.manual_seed(0)
    model = Model(ModelArgs(max_seq_len=max_seq_len, **SHARED, **SIZES[name])).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
    return model


def ours(name: str, precision: str, compiled: bool, slots: int = 1) -> Contender:
    model = our_model(name, precision)
    decode_step = prepare_for_decoding(model, precision, compiled, slots)

    def answer(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        return generate(model, TOKENIZER, prompts, tokens, stop_ids=(), decode_step=decode_step, temperature=0)

    @torch.inference_mode()
    def logits(ids: list[int]) -> torch.Tensor:
        """Prefill all but the last token, which is a decode step."""
        state = model.init_state(1)
        model(torch.tensor([ids[:-1]]), state=state)
        state.advance(len(ids) - 1)
        state.last_only = True
        return decode_step(torch.tensor([ids[-1:]]), state)[0, -1].float()

    return answer, logits


def their_model(ours: BaseModel, precision: str, folder: str) -> Any:
    """Return transformers' model with the weights of ours."""
    from transformers import AutoModelForCausalLM

    config, tensors = ours.to_hf()
    Path(folder, "config.json").write_text(json.dumps(config))
    save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision]).eval()


def theirs(name: str, precision: str, folder: str) -> Contender:
    """transformers, used as in its documentation."""
    model = their_model(our_model(name, "fp32"), precision, folder)
    model.generation_config.pad_token_id = 0

    def answer(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
        return out[:, ids.shape[1] :].tolist()

    @torch.inference_mode()
    def logits(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0, -1].float()

    return answer, logits


def llama_cpp(precision: str, folder: str, slots: int) -> Contender:
    """llama.cpp's own server in this process: one call per request, its C++ does the rest."""
    import gguf
    import xllamacpp

    path = str(Path(folder, f"{precision}.gguf"))
    write_gguf(gguf, our_model(DENSE, "fp32"), path, precision)
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 512 * slots
    params.n_parallel = slots
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.cache_ram_mib = 0
    params.verbosity = -1
    server = xllamacpp.Server(params)
    clients = ThreadPoolExecutor(slots)

    def complete(ids: list[int], tokens: int, **more: Any) -> Any:
        request = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return server.handle_completions({**request, **more})

    def answer(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        done = clients.map(lambda ids: complete(ids, tokens), prompts)
        return [[0] * one["usage"]["completion_tokens"] for one in done]  # their number is what is used

    def logits(ids: list[int]) -> torch.Tensor:
        vocab_size = SHARED["vocab_size"]
        (first,) = complete(ids, 1, logprobs=vocab_size)["choices"][0]["logprobs"]["content"]
        found = torch.full((vocab_size,), math.nan)
        for one in first["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found

    return answer, logits


def write_gguf(gguf: ModuleType, model: Any, path: str, precision: str) -> None:
    """Write our dense model for llama.cpp, in whose layout rotary pairs are adjacent."""
    a = model.args
    kind = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}[precision]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(a.max_seq_len)
    writer.add_embedding_length(a.dim)
    writer.add_block_count(a.n_layers)
    writer.add_feed_forward_length(a.inter_dim)
    writer.add_head_count(a.n_heads)
    writer.add_head_count_kv(a.n_kv_heads)
    writer.add_layer_norm_rms_eps(a.norm_eps)
    writer.add_rope_freq_base(a.rope_theta)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_vocab_size(a.vocab_size)
    # invented words: prompts are ids, and the server writes text
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, a.vocab_size))])
    writer.add_token_scores([0.0] * a.vocab_size)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (a.vocab_size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)

    def add(name: str, tensor: torch.Tensor) -> None:
        values = tensor.detach().float().numpy()
        if tensor.ndim == 2:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)

    def interleaved(weight: torch.Tensor) -> torch.Tensor:
        return weight.unflatten(0, (-1, 2, a.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    add("token_embd.weight", model.tok_embed.weight)
    add("output_norm.weight", model.norm.weight)
    for i, layer in enumerate(model.layers):
        add(f"blk.{i}.attn_norm.weight", layer.attn_norm.weight)
        add(f"blk.{i}.attn_q.weight", interleaved(layer.attn.q_proj.weight))
        add(f"blk.{i}.attn_k.weight", interleaved(layer.attn.k_proj.weight))
        add(f"blk.{i}.attn_v.weight", layer.attn.v_proj.weight)
        add(f"blk.{i}.attn_output.weight", layer.attn.o_proj.weight)
        add(f"blk.{i}.ffn_norm.weight", layer.ffn_norm.weight)
        for part in ("gate", "up", "down"):
            add(f"blk.{i}.ffn_{part}.weight", getattr(layer.ffn, f"{part}_proj").weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def contenders(config: Config, name: str, slots: int, folder: str) -> dict[str, Contender]:
    """Return {label: contender}, the baselines first."""
    found = {f"transformers {precision}": theirs(name, precision, folder) for precision in ("fp32", "bf16")}
    if name == DENSE and config.llama_cpp:
        found |= {f"llama.cpp {kind}": llama_cpp(kind, folder, slots) for kind in ("f16", "q8_0")}
    plain = [("fp16", False), ("bf16", False), ("int8", False)] if slots == 1 else [("bf16", False)]
    for precision, compiled in [*plain, ("bf16", True), ("int8", True)]:
        found[f"ours {precision}{' compiled' if compiled else ''}"] = ours(name, precision, compiled, slots)
    return found


def compare(config: Config, name: str, slots: int) -> dict[str, float]:
    """Return {label: tokens per second}, the median over the rounds."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, SHARED["vocab_size"], (slots, PROMPT), generator=generator).tolist()
    with torch.inference_mode():
        exact = our_model(name, "fp32")(torch.tensor(prompts[:1]))[0][0, -1]
    with tempfile.TemporaryDirectory() as folder:
        found = contenders(config, name, slots, folder)
        for label, (answer, logits) in found.items():
            error = difference(logits(prompts[0]), exact)
            assert error < 0.1, f"{label} computes another model: its logits are {error:.2f} away"
            answer(prompts, 8)
        seconds: dict[str, list[float]] = {label: [] for label in found}
        for _ in range(config.rounds):
            for label, (answer, _) in found.items():
                start = time.perf_counter()
                answers = answer(prompts, config.tokens)
                seconds[label].append(time.perf_counter() - start)
                assert [len(one) for one in answers] == [config.tokens] * slots
    return {label: round(slots * config.tokens / statistics.median(times), 1) for label, times in seconds.items()}


def difference(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the relative distance of logits (V,), which mean the same with any constant added."""
    logits = logits - logits.mean()
    exact = exact - exact.mean()
    return ((logits - exact).norm() / exact.norm()).item()


def bandwidth(gigabytes: float = 0.5) -> float:
    """Return the bytes per second at which a large tensor is read, the best of several."""
    x = torch.ones(int(gigabytes * 2**30 / 4))
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        x.sum()
        best = max(best, x.nbytes / (time.perf_counter() - start))
    return best


def shares_of_bandwidth(name: str, rates: dict[str, float], about: dict[str, Any]) -> dict[str, float | None]:
    """Return of our rates the share of about["bandwidth_gb_s"] at which they read the active weights, at most 1.

    A bandwidth that is exceeded is measured again. None: the weights come from a cache, faster than from memory.
    """
    read = {}
    for label, rate in rates.items():
        precision = next((part for part in label.split() if part in BYTES), None)
        if precision and label.startswith("ours"):
            read[label] = rate * active_bytes(name, precision) / 1e9
    if max(read.values()) > about["bandwidth_gb_s"]:
        about["bandwidth_gb_s"] = max(about["bandwidth_gb_s"], round(bandwidth() / 1e9, 1))
        print(f"the bandwidth was exceeded and is measured again: {about['bandwidth_gb_s']} GB/s", flush=True)
    shares = {label: round(speed / about["bandwidth_gb_s"], 3) for label, speed in read.items()}
    return {label: share if share <= 1 else None for label, share in shares.items()}


def active_bytes(name: str, precision: str) -> int:
    """Return the bytes of the weights that one token reads: of a tied embedding table, those of the output head."""
    model = our_model(name, "fp32")
    counts = model.num_params()
    return (counts["active"] - (0 if model.args.tie_embeddings else counts["embedding"])) * BYTES[precision]


@torch.inference_mode()
def by_position(name: str, quick: bool) -> dict[str, dict[int, float]]:
    """Return {"ours" | "transformers": {position: milliseconds per decode step}}: bf16, ours compiled.

    One after the other: the growth of each is what counts.
    """
    times: dict[str, dict[int, float]] = {}
    logits = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, at in ("ours", our_steps(name)), ("transformers", their_steps(name, folder)):
            times[label] = {}
            for position in POSITIONS[: 1 if quick else None]:
                step = at(position)
                logits[label] = step()
                times[label][position] = round(1000 * median_seconds(step), 3)
    error = difference(logits["transformers"], logits["ours"])
    assert error < 0.1, f"{name}: transformers computes another model, its logits are {error:.2f} away"
    return times


def median_seconds(step: Callable[[], torch.Tensor]) -> float:
    """Return the median over at least 30 calls and 0.3 seconds."""
    taken: list[float] = []
    while len(taken) < 30 or sum(taken) < 0.3:
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def chunks(length: int) -> tuple[torch.Tensor, ...]:
    """Return `length` random tokens in chunks (1, n), n <= 512: the full square of scores would not fit."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, SHARED["vocab_size"], (1, length), generator=generator).split(512, dim=1)


def our_steps(name: str) -> Callable[[int], Callable[[], torch.Tensor]]:
    """Return a function from a position to a decode step there."""
    model = our_model(name, "bf16", POSITIONS[-1] + 64)
    decode_step = prepare_for_decoding(model, "bf16", compile=True)

    def at(position: int) -> Callable[[], torch.Tensor]:
        state = model.init_state(1)
        state.last_only = True
        for ids in chunks(position):
            model(ids, state=state)
            state.advance(ids.shape[1])
        return lambda: decode_step(NEXT, state)[0, -1]

    return at


def their_steps(name: str, folder: str) -> Callable[[int], Callable[[], torch.Tensor]]:
    """The same of transformers, whose cache grows: each step removes what it has added."""
    model = their_model(our_model(name, "fp32", POSITIONS[-1] + 64), "bf16", folder)

    def at(position: int) -> Callable[[], torch.Tensor]:
        cache: Any = None
        for ids in chunks(position):
            cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

        def step() -> torch.Tensor:
            logits = model(NEXT, past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return logits[0, -1]

        return step

    return at


def table(results: dict[str, Any]) -> str:
    lines = [
        "| | requests | tokens/s | times transformers | of what the bandwidth allows |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, rates in results["tokens_per_s"].items():
        name, slots = key.split(" x")
        base = max(rate for label, rate in rates.items() if label.startswith("transformers"))
        for label, rate in rates.items():
            share = results["of_bandwidth"].get(f"{key} {label}")
            percent = "" if share is None else f"{100 * share:.0f}%"
            lines.append(f"| {name}, {label} | {slots} | {rate:,.0f} | {rate / base:.2f} | {percent} |")
    return "\n".join(lines)


def main() -> None:
    config = parse(Config)
    if config.quick:
        config.tokens, config.rounds = 12, 1
    require_packages("transformers", change="pip install -e .[test]")
    config.llama_cpp &= DENSE in config.models and bool(config.rows)
    if config.llama_cpp:
        require_packages(
            "xllamacpp", "gguf", change="pip install -e .[bench], or leave llama.cpp out by --no_llama_cpp"
        )
    about: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": f"python benchmarks/decode.py {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{platform.machine()}, {cpu_name()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "bandwidth_gb_s": round(bandwidth() / 1e9, 1),
        "sizes": {"shared": SHARED, **SIZES},
    }
    if config.llama_cpp:
        import xllamacpp

        about["xllamacpp"] = version("xllamacpp")
        about["llama_cpp_uses"] = xllamacpp.get_system_info().strip(" |")
    path = Path(config.results)
    results: dict[str, Any] = {"tokens_per_s": {}, "of_bandwidth": {}, "positions": {}, "abouts": {}}
    if path.exists():  # what this call does not measure is kept
        results |= json.loads(path.read_text(encoding="utf-8"))
    for name in config.models:
        for slots in config.rows:
            rates = compare(config, name, slots)
            results["tokens_per_s"][f"{name} x{slots}"] = rates
            results["abouts"][f"{name} x{slots}"] = about
            if slots == 1:
                shares = shares_of_bandwidth(name, rates, about)
                results["of_bandwidth"] |= {f"{name} x{slots} {label}": share for label, share in shares.items()}
            print(name, slots, rates, flush=True)
            save(path, results)
        if config.positions:
            results["positions"][name] = by_position(name, config.quick)
            results["abouts"][f"{name} positions"] = about
            print(name, "milliseconds per decode step by position", results["positions"][name], flush=True)
            save(path, results)
    print(table(results))


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"{os.cpu_count()} cores"


if __name__ == "__main__":
    run_script(main)
