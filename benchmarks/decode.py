"""Decoding speed: tokens a second beside transformers' `generate` and, for the dense model, llama.cpp.

    pip install -e .[test,bench]
    python benchmarks/decode.py              dense and mixture, alone and 8 requests side by side
    python benchmarks/decode.py --models mini_llama3 --rows 1      a part; the figures of the others stay in the file
    python benchmarks/decode.py --quick      few tokens, one round: does it all run?

The same random weights everywhere, greedy, a prompt of 16 tokens. All take turns in one process, and a figure is the
median over the rounds. Before it is timed, each one's first logits are compared with ours. Beside the rates: the
share of what reading the active weights once a token allows at the memory bandwidth measured here,
and the time of a step by the position it stands at, ours and transformers' one after the other. Writes
benchmarks/results/decode.json and prints the tables.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from engine.inference.batch import read  # noqa: E402
from engine.inference.compile import compile_decoding  # noqa: E402
from engine.inference.generate import generate  # noqa: E402
from model import get_model_and_args  # noqa: E402
from model.kernels.int8 import to_int8  # noqa: E402
from utils.config import opt, parse  # noqa: E402
from utils.errors import run_script  # noqa: E402

DENSE, MIXTURE = "mini_llama3", "mini_deepseekv3"
SIZES = {
    DENSE: dict(n_kv_heads=2, head_dim=64, inter_dim=1024),
    MIXTURE: dict(
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
SHARED = dict(vocab_size=8192, dim=384, n_layers=6, n_heads=6)
PROMPT = 16
POSITIONS = (64, 512, 1024, 2048, 4000)
NEXT = torch.tensor([[5]])  # the token of a step there
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}
TOKENIZER = SimpleNamespace(eos_id=None, im_end_id=None)


@dataclass
class Config:
    __doc__ = __doc__
    models: list[str] = opt([DENSE, MIXTURE], "architectures")
    rows: list[int] = opt([1, 8], "requests side by side")
    tokens: int = opt(60, "of an answer")
    rounds: int = opt(5, "measured answers of each")
    llama_cpp: bool = opt(True, "compare llama.cpp where it can hold the model")
    positions: bool = opt(True, "time a step at several positions")
    quick: bool = opt(False, "12 tokens, one round")
    results: str = opt(str(ROOT / "benchmarks/results/decode.json"), "where the figures go")


def our_model(name, precision, max_seq_len=512):
    Model, ModelArgs = get_model_and_args(name)
    torch.manual_seed(0)
    model = Model(ModelArgs(max_seq_len=max_seq_len, **SHARED, **SIZES[name])).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
    return to_int8(model) if precision == "int8" else model


def ours(name, precision, compiled, rows=1):
    """(function from prompts and a number of tokens to answers, logits behind the first prompt)"""
    model = our_model(name, precision)
    if compiled:
        compile_decoding(model, rows)

    def answer(prompts, tokens):
        return generate(model, TOKENIZER, prompts, tokens, stop_ids=(), temperature=0)

    @torch.inference_mode()
    def logits(ids):
        """The last ones by a step of decoding, compiled or not."""
        state = model.init_state(1)
        model(torch.tensor([ids[:-1]]), state=state)
        state.advance(len(ids) - 1)
        state.last_only = True
        return read(model, torch.tensor([ids[-1:]]), state)[0, -1].float()

    return answer, logits


def their_model(ours, precision, folder):
    """transformers' model with the weights of ours."""
    from transformers import AutoModelForCausalLM

    config, tensors = ours.to_hf()
    Path(folder, "config.json").write_text(json.dumps(config))
    save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision]).eval()


def theirs(name, precision, folder):
    """The same of transformers, used as its documentation says."""
    model = their_model(our_model(name, "fp32"), precision, folder)
    model.generation_config.pad_token_id = 0

    def answer(prompts, tokens):
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
        return out[:, ids.shape[1] :].tolist()

    @torch.inference_mode()
    def logits(ids):
        return model(torch.tensor([ids])).logits[0, -1].float()

    return answer, logits


def llama_cpp(precision, folder):
    """The same of llama.cpp, by its own decoding call for each token; the likeliest token is found here."""
    import gguf
    import numpy as np
    from llama_cpp import Llama

    model, path = our_model(DENSE, "fp32"), str(Path(folder, f"{precision}.gguf"))
    write_gguf(gguf, model, path, precision)
    threads = torch.get_num_threads()
    llm = Llama(
        path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False, n_gpu_layers=0
    )

    def last():
        return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(SHARED["vocab_size"],))

    def answer(prompts, tokens):
        answers = []
        for ids in prompts:
            llm.reset()
            llm.eval(ids)
            answers.append([int(last().argmax())])
            while len(answers[-1]) < tokens:
                llm.eval(answers[-1][-1:])
                answers[-1].append(int(last().argmax()))
        return answers

    def logits(ids):
        llm.reset()
        llm.eval(ids)
        return torch.from_numpy(last().copy())

    return answer, logits


def write_gguf(gguf, model, path, precision):
    """Our dense model as llama.cpp reads it: rotary pairs are neighbours there."""
    a, kind = model.args, {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}[precision]
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
    writer.add_tokenizer_model("no_vocab")

    def add(name, tensor):
        numbers = tensor.detach().float().numpy()
        if tensor.ndim == 2:
            writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, numbers)

    def neighbours(weight):
        return weight.unflatten(0, (-1, 2, a.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    add("token_embd.weight", model.tok_embed.weight)
    add("output_norm.weight", model.norm.weight)
    for i, layer in enumerate(model.layers):
        add(f"blk.{i}.attn_norm.weight", layer.attn_norm.weight)
        add(f"blk.{i}.attn_q.weight", neighbours(layer.attn.q_proj.weight))
        add(f"blk.{i}.attn_k.weight", neighbours(layer.attn.k_proj.weight))
        add(f"blk.{i}.attn_v.weight", layer.attn.v_proj.weight)
        add(f"blk.{i}.attn_output.weight", layer.attn.o_proj.weight)
        add(f"blk.{i}.ffn_norm.weight", layer.ffn_norm.weight)
        for part in ("gate", "up", "down"):
            add(f"blk.{i}.ffn_{part}.weight", getattr(layer.ffn, f"{part}_proj").weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def contenders(config, name, rows, folder):
    """{label: (answer, logits)}, the baselines first."""
    found = {f"transformers {precision}": theirs(name, precision, folder) for precision in ("fp32", "bf16")}
    if name == DENSE and rows == 1 and config.llama_cpp:
        found |= {f"llama.cpp {kind}": llama_cpp(kind, folder) for kind in ("f16", "q8_0")}
    plain = [("fp16", False), ("bf16", False), ("int8", False)] if rows == 1 else [("bf16", False)]
    for precision, compiled in [*plain, ("bf16", True), ("int8", True)]:
        found[f"ours {precision}{' compiled' if compiled else ''}"] = ours(name, precision, compiled, rows)
    return found


def compare(config, name, rows):
    """{label: tokens a second}, the median over the rounds."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, SHARED["vocab_size"], (rows, PROMPT), generator=generator).tolist()
    with torch.inference_mode():
        exact = our_model(name, "fp32")(torch.tensor(prompts[:1]))[0][0, -1]
    with tempfile.TemporaryDirectory() as folder:
        found = contenders(config, name, rows, folder)
        for label, (answer, logits) in found.items():
            error = ((logits(prompts[0]) - exact).norm() / exact.norm()).item()
            assert error < 0.1, f"{label} computes another model: its logits are {error:.2f} away"
            answer(prompts, 8)
        seconds = {label: [] for label in found}
        for _ in range(config.rounds):
            for label, (answer, _) in found.items():
                start = time.perf_counter()
                answers = answer(prompts, config.tokens)
                seconds[label].append(time.perf_counter() - start)
                assert [len(one) for one in answers] == [config.tokens] * rows
    return {label: round(rows * config.tokens / statistics.median(times), 1) for label, times in seconds.items()}


def bandwidth(gigabytes=0.5):
    """Bytes a second at which large tensors are read, the best of several."""
    x, best = torch.ones(int(gigabytes * 2**30 / 4)), 0.0
    for _ in range(8):
        start = time.perf_counter()
        x.sum()
        best = max(best, x.nbytes / (time.perf_counter() - start))
    return best


def active_bytes(name, precision):
    """Of the weights that one token reads: a table of embeddings is read as the output head."""
    model = our_model(name, "fp32")
    counts = model.num_params()
    return (counts["active"] - (0 if model.args.tie_embeddings else counts["embedding"])) * BYTES[precision]


@torch.inference_mode()
def by_position(name, quick):
    """{"ours" | "transformers": {position: milliseconds of a step}}, bf16, ours compiled; one after the other, as it is
    the growth of each that counts."""
    times, logits = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for who, to in ("ours", our_walk(name)), ("transformers", their_walk(name, folder)):
            times[who] = {}
            for position in POSITIONS[: 1 if quick else None]:
                step, taken = to(position), []
                logits[who] = step()
                while len(taken) < 30 or sum(taken) < 0.3:  # seconds; of a short step many
                    start = time.perf_counter()
                    step()
                    taken.append(time.perf_counter() - start)
                times[who][position] = round(1000 * statistics.median(taken), 3)
    error = ((logits["ours"] - logits["transformers"]).norm() / logits["ours"].norm()).item()
    assert error < 0.1, f"{name}: transformers computes another model, its logits are {error:.2f} away"
    return times


def pieces(length):
    """Random tokens (1, n), n <= 512, that are `length` together: a whole square of scores would not fit."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, SHARED["vocab_size"], (1, length), generator=generator).split(512, dim=1)


def our_walk(name):
    """A function from a position to a step there."""
    model = our_model(name, "bf16", POSITIONS[-1] + 64)
    compile_decoding(model)

    def to(position):
        state = model.init_state(1)
        state.last_only = True
        for ids in pieces(position):
            model(ids, state=state)
            state.advance(ids.shape[1])
        return lambda: model.reader(NEXT, state)[0, -1]

    return to


def their_walk(name, folder):
    """The same of transformers, whose cache grows: each step takes off what it has added."""
    model = their_model(our_model(name, "fp32", POSITIONS[-1] + 64), "bf16", folder)

    def to(position):
        cache = None
        for ids in pieces(position):
            cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

        def step():
            logits = model(NEXT, past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return logits[0, -1]

        return step

    return to


def table(results):
    lines = [
        "| | requests | tokens/s | times transformers | of what the bandwidth allows |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, rates in results["tokens_per_s"].items():
        name, rows = key.split(" x")
        base = max(rate for label, rate in rates.items() if label.startswith("transformers"))
        for label, rate in rates.items():
            share = results["of_bandwidth"].get(f"{key} {label}")
            share = "" if share is None else f"{100 * share:.0f}%"
            lines.append(f"| {name}, {label} | {rows} | {rate:,.0f} | {rate / base:.2f} | {share} |")
    return "\n".join(lines)


def main():
    config = parse(Config)
    if config.quick:
        config.tokens, config.rounds = 12, 1
    import transformers

    about = {
        "date": date.today().isoformat(),
        "command": f"python benchmarks/decode.py {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{platform.machine()}, {cpu_name()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bandwidth_gb_s": round(bandwidth() / 1e9, 1),
        "sizes": {"shared": SHARED, **SIZES},
    }
    if config.llama_cpp:
        from importlib.metadata import version

        about["llama_cpp_python"] = version("llama-cpp-python")
    path = Path(config.results)
    results = {"tokens_per_s": {}, "of_bandwidth": {}, "positions": {}, "abouts": {}}
    if path.exists():  # what this call does not measure stays
        results |= json.loads(path.read_text(encoding="utf-8"))
    for name in config.models:
        for rows in config.rows:
            rates = results["tokens_per_s"][f"{name} x{rows}"] = compare(config, name, rows)
            results["abouts"][f"{name} x{rows}"] = about
            for label, rate in rates.items():
                precision = next((part for part in label.split() if part in BYTES), None)
                if rows == 1 and label.startswith("ours"):
                    allowed = about["bandwidth_gb_s"] * 1e9 / active_bytes(name, precision)
                    results["of_bandwidth"][f"{name} x{rows} {label}"] = round(rate / allowed, 3)
            print(name, rows, rates, flush=True)
            save(path, results)
        if config.positions:
            results["positions"][name] = by_position(name, config.quick)
            results["abouts"][f"{name} positions"] = about
            print(name, "milliseconds a step by position", results["positions"][name], flush=True)
            save(path, results)
    print(table(results))


def save(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"{os.cpu_count()} cores"


if __name__ == "__main__":
    run_script(main)
