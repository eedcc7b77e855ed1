"""What speculation and 8-bit weights do to a trained run: identical answers, calls and time saved; held-out loss lost.

    python benchmarks/speculative.py                                the newest fine-tuned run and the held-out chats
    python benchmarks/speculative.py --run output/sft_MODEL --prompts=20

Every prompt is a held-out conversation up to its first answer. It is answered plainly and by each way to speculate, in
turns, in fp32; the answers that are the same are counted. Then the held-out loss with weights in fp32, bf16 and at 8
bits; bits a character change by the same factor. Writes benchmarks/results/speculative.json.
"""

import json
import platform
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from engine.inference.chat import DTYPES, choose_run  # noqa: E402
from engine.inference.generate import decode, new_request  # noqa: E402
from engine.inference.sampling import Sampling  # noqa: E402
from engine.runs.registry import load_run  # noqa: E402
from model.kernels.int8 import to_int8  # noqa: E402
from utils.config import opt, parse  # noqa: E402
from utils.errors import run_script  # noqa: E402


@dataclass
class Config:
    __doc__ = __doc__
    run: str = opt("", "run folder (empty: the newest in output_path)", path=True)
    output_path: str = opt("output", "folder of the runs", path=True)
    data_path: str = opt("output/data/sft_val", "held-out conversations, without .bin", path=True)
    prompts: int = opt(200, "answered")
    chats: int = opt(500, "read for the loss")
    max_new_tokens: int = opt(100, "of an answer")
    results: str = opt(str(ROOT / "benchmarks/results/speculative.json"), "where the figures go")


def conversations(path, tokenizer, count, max_seq_len):
    """[(ids, mask)] of the first conversations that fit; mask: the tokens that the model is to write."""
    dtype = json.loads(Path(f"{path}.meta.json").read_text())["dtype"]
    ids, mask = np.fromfile(f"{path}.bin", dtype), np.fromfile(f"{path}.mask.bin", np.uint8)
    starts = [*np.load(f"{path}.docs.npy").tolist(), len(ids)]
    chats = [(ids[a:b].tolist(), mask[a:b].tolist()) for a, b in zip(starts, starts[1:])]
    return [(row, wanted) for row, wanted in chats if any(wanted) and len(row) < max_seq_len][:count]


def answer(model, tokenizer, ids, config, sampling, kind):
    request = new_request(tokenizer, ids, config.max_new_tokens, sampling)
    start = time.perf_counter()
    steps = sum(1 for _ in decode(model, [request], kind))
    return request, steps, time.perf_counter() - start


def speculate(model, tokenizer, prompts, config, sampling, kinds):
    """{kind: figures} over all prompts; the plain way takes its turn with them."""
    found = {kind: dict(calls=0, guesses=0, hits=0, seconds=0.0, identical=0) for kind in ("", *kinds)}
    tokens = 0
    for number, ids in enumerate(prompts):
        own = sampling.of_row(number)
        for kind, figures in found.items():
            request, steps, seconds = answer(model, tokenizer, ids, config, own, kind)
            if not kind:
                plain, tokens = request.tokens, tokens + len(request.tokens)
            figures["identical"] += request.tokens == plain
            figures["calls"] += request.calls or steps
            figures["guesses"] += request.guesses
            figures["hits"] += request.hits
            figures["seconds"] += seconds
    base = found[""]
    return {
        kind or "plain": dict(
            identical=f"{f['identical']} of {len(prompts)}",
            calls_a_token=round(f["calls"] / tokens, 3),
            fewer_calls=round(base["calls"] / f["calls"], 3),
            accepted=round(f["hits"] / max(1, f["guesses"]), 3),
            tokens_per_s=round(tokens / f["seconds"], 1),
            faster=round(base["seconds"] / f["seconds"], 3),
        )
        for kind, f in found.items()
    }


@torch.inference_mode()
def held_out(model, chats):
    """Nats a target token."""
    nats = targets = 0
    for ids, mask in chats:
        wanted = torch.tensor([[token if m else -100 for token, m in zip(ids[1:], mask[1:])]])
        _, loss, other_vars = model(torch.tensor([ids[:-1]]), targets=wanted)
        count = (wanted != -100).sum().item()
        nats, targets = nats + other_vars.get("loss/ce", loss).item() * count, targets + count
    return nats / targets


def main():
    config = parse(Config)
    run = config.run or choose_run(config.output_path)
    loaded = load_run(run)
    model, tokenizer = loaded.model, loaded.tokenizer
    chats = conversations(config.data_path, tokenizer, max(config.prompts, config.chats), model.args.max_seq_len)
    prompts = [ids[: mask.index(1)] for ids, mask in chats[: config.prompts]]
    kinds = ("mtp", "ngram") if model.draft is not None else ("ngram",)
    results = {
        "date": date.today().isoformat(),
        "command": f"python benchmarks/speculative.py --prompts={config.prompts} "
        f"--max_new_tokens={config.max_new_tokens}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "model": model.model_name,
        "parameters": model.num_params(),
        "held_out_nats": {},
    }
    for label, sampling in (("greedy", Sampling(0)), ("temperature 0.7", Sampling(0.7, top_p=0.9, seed=0))):
        results[label] = speculate(model, tokenizer, prompts, config, sampling, kinds)
        print(label, json.dumps(results[label], indent=1), flush=True)
        save(config.results, results)
    for precision in ("fp32", "bf16", "int8"):
        model = load_run(run, dtype=DTYPES[precision]).model
        if precision == "int8":
            to_int8(model)
        results["held_out_nats"][precision] = round(held_out(model, chats[: config.chats]), 5)
        print(precision, results["held_out_nats"][precision], flush=True)
    save(config.results, results)


def save(path, results):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
