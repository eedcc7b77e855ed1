"""Speculative decoding and int8 weights of a trained run: identical answers, forward passes and time saved; loss.

    python benchmarks/speculative.py                                the newest fine-tuned run and the held-out chats
    python benchmarks/speculative.py --run output/sft_MODEL --prompts=20

Every prompt is a held-out conversation up to its first answer. It is answered without speculation and with each kind,
in turns, in fp32; identical answers are counted. Then the held-out loss with weights in fp32, bf16 and int8; bits per
character change by the same factor. Writes benchmarks/results/speculative.json.
"""

import json
import platform
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from engine.inference.chat import DTYPES, choose_run  # noqa: E402
from engine.inference.generate import decode, new_request  # noqa: E402
from engine.inference.request import Request  # noqa: E402
from engine.inference.sampling import Sampling  # noqa: E402
from engine.runs.registry import load_run  # noqa: E402
from model import BaseModel  # noqa: E402
from model.kernels.prepare import prepare_for_decoding  # noqa: E402
from utils.config import opt, parse  # noqa: E402
from utils.errors import run_script  # noqa: E402
from utils.tokenizer import Tokenizer  # noqa: E402

Chat = tuple[list[int], list[int]]  # token ids, mask: 1 for those that the model is to write


@dataclass
class Config:
    __doc__ = __doc__
    run: str = opt("", "run folder (empty: the newest in output_path)", path=True)
    output_path: str = opt("output", "folder of the runs", path=True)
    data_path: str = opt("output/data/sft_val", "held-out conversations, without .bin", path=True)
    prompts: int = opt(200, "answered")
    chats: int = opt(500, "read for the loss")
    max_new_tokens: int = opt(100, "of an answer")
    results: str = opt(str(ROOT / "benchmarks/results/speculative.json"), "file of the figures")


def conversations(path: str, count: int, max_seq_len: int) -> list[Chat]:
    """Return the first conversations that fit."""
    dtype = json.loads(Path(f"{path}.meta.json").read_text())["dtype"]
    ids, mask = np.fromfile(f"{path}.bin", dtype), np.fromfile(f"{path}.mask.bin", np.uint8)
    starts = [*np.load(f"{path}.docs.npy").tolist(), len(ids)]
    chats = [(ids[a:b].tolist(), mask[a:b].tolist()) for a, b in zip(starts, starts[1:])]
    return [(chat, wanted) for chat, wanted in chats if any(wanted) and len(chat) < max_seq_len][:count]


def answer(
    model: BaseModel, tokenizer: Tokenizer, ids: list[int], max_new_tokens: int, sampling: Sampling, kind: str
) -> tuple[Request, int, float]:
    """Answer a prompt: (request, scheduler steps, seconds)."""
    request = new_request(tokenizer, ids, max_new_tokens, sampling)
    start = time.perf_counter()
    steps = sum(1 for _ in decode(model, [request], kind))
    return request, steps, time.perf_counter() - start


def speculate(
    model: BaseModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    kinds: tuple[str, ...],
) -> dict[str, dict[str, Any]]:
    """Return {kind: figures} over all prompts; "plain" takes turns with them."""
    found: dict[str, dict[str, Any]] = {
        kind: dict(passes=0, drafted=0, accepted=0, seconds=0.0, identical=0) for kind in ("", *kinds)
    }
    tokens = 0
    plain: list[int] = []
    for number, ids in enumerate(prompts):
        own = sampling.offset_seed(number)
        for kind, figures in found.items():
            request, steps, seconds = answer(model, tokenizer, ids, max_new_tokens, own, kind)
            if not kind:
                plain = request.tokens
                tokens += len(plain)
            figures["identical"] += request.tokens == plain
            figures["passes"] += request.forward_passes or steps
            figures["drafted"] += request.drafted
            figures["accepted"] += request.accepted
            figures["seconds"] += seconds
    base = found[""]
    return {
        kind or "plain": dict(
            identical=f"{f['identical']} of {len(prompts)}",
            calls_a_token=round(f["passes"] / tokens, 3),
            fewer_calls=round(base["passes"] / f["passes"], 3),
            accepted=round(f["accepted"] / max(1, f["drafted"]), 3),
            tokens_per_s=round(tokens / f["seconds"], 1),
            faster=round(base["seconds"] / f["seconds"], 3),
        )
        for kind, f in found.items()
    }


@torch.inference_mode()
def held_out(model: BaseModel, chats: list[Chat]) -> float:
    """Return the loss in nats per target token."""
    nats = 0.0
    targets = 0
    for ids, mask in chats:
        wanted = torch.tensor([[token if m else -100 for token, m in zip(ids[1:], mask[1:])]])
        _, loss, other_vars = model(torch.tensor([ids[:-1]]), targets=wanted)
        count = int((wanted != -100).sum())
        nats += other_vars.get("loss/ce", loss).item() * count
        targets += count
    return nats / targets


def main() -> None:
    config = parse(Config)
    run = config.run or str(choose_run(config.output_path))
    loaded = load_run(run)
    model = loaded.model
    tokenizer = loaded.tokenizer
    chats = conversations(config.data_path, max(config.prompts, config.chats), model.args.max_seq_len)
    prompts = [ids[: mask.index(1)] for ids, mask in chats[: config.prompts]]
    kinds = ("draft", "ngram") if model.draft is not None else ("ngram",)
    results: dict[str, Any] = {
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
        results[label] = speculate(model, tokenizer, prompts, config.max_new_tokens, sampling, kinds)
        print(label, json.dumps(results[label], indent=1), flush=True)
        save(config.results, results)
    for precision in ("fp32", "bf16", "int8"):
        model = load_run(run, dtype=DTYPES[precision]).model
        prepare_for_decoding(model, precision)  # quantizes the weights of int8
        results["held_out_nats"][precision] = round(held_out(model, chats[: config.chats]), 5)
        print(precision, results["held_out_nats"][precision], flush=True)
    save(config.results, results)


def save(path: str, results: dict[str, Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
