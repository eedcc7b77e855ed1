"""Tokenizer training: time and peak memory of ours and of the trainer of `tokenizers`, and whether they write the same.

    python benchmarks/tokenizer_training.py                          poems and idioms, 32,000 tokens
    python benchmarks/tokenizer_training.py --sources=my.jsonl       another corpus

Both read the same documents through the same pipeline, each in a process of its own, one after the other, at --compare
characters; then ours alone at the default of train_tokenizer.py. Writes benchmarks/results/tokenizer_training.json.
"""

import hashlib
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tokenizers import Tokenizer as Backend  # noqa: E402

import train_tokenizer as ours  # noqa: E402
from preprocess_data.corpora.registry import CORPORA_PATH, find_sources  # noqa: E402
from utils.config import opt, parse  # noqa: E402
from utils.errors import run_script  # noqa: E402
from utils.log import log  # noqa: E402
from utils.tokenizer import N_SPECIAL, SPECIAL_TOKENS  # noqa: E402


@dataclass
class BenchmarkConfig:
    """Measures the training of a tokenizer."""

    sources: str = opt("poems,idioms", "corpora, files, folders or globs, separated by commas")
    corpora_path: str = opt(CORPORA_PATH, "folder with the named corpora", path=True)
    vocab_size: int = opt(32_000, "tokens")
    compare: int = opt(8_000_000, "characters for both trainers; 0: ours alone")
    results_path: str = opt("benchmarks/results/tokenizer_training.json", "file to write", path=True)


def reference(texts, vocab_size: int, min_frequency: int = 2, split_han: bool = False) -> Backend:
    """What train_tokenizer.train does, by the trainer of `tokenizers`."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = ours.pre_tokenizer(ours._DIGIT, *([ours._HAN] if split_han else []))
    backend.decoder = decoders.ByteLevel()
    special = [*SPECIAL_TOKENS, *(f"<|reserved_{i}|>" for i in range(N_SPECIAL - len(SPECIAL_TOKENS)))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = ours.pre_tokenizer()
    return backend


def measure(trainer: str, characters: int, config: BenchmarkConfig) -> dict:
    """Train once, in this process; the peak is of the whole process."""
    sources = find_sources(config.sources, Path(config.corpora_path))
    read = []

    def texts():
        for text in ours.training_texts(sources, characters):
            read.append(len(text))
            yield text

    start = time.monotonic()
    backend = {"ours": ours.train, "tokenizers": reference}[trainer](texts(), config.vocab_size)
    return {
        "trainer": trainer,
        "characters": sum(read),
        "documents": len(read),
        "seconds": round(time.monotonic() - start, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "sha256": hashlib.sha256(backend.to_str().encode()).hexdigest(),
    }


def main(argv: list[str] | None = None) -> None:
    config = parse(BenchmarkConfig, argv)
    default = ours.TokenizerConfig().max_characters
    runs = [("tokenizers", config.compare), ("ours", config.compare)] * (config.compare > 0) + [("ours", default)]
    rows = []
    for trainer, characters in runs:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measure, trainer, characters, config).result())
        log("{trainer:>10}  {characters} characters  {seconds} s  {peak_mb} MB".format(**rows[-1]))
    if config.compare:
        log(f"the same file: {rows[0]['sha256'] == rows[1]['sha256']}")
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": " ".join(["python benchmarks/tokenizer_training.py", *(sys.argv[1:] if argv is None else argv)]),
        "versions": {name: version(name) for name in ("tokenizers", "gigabpe")},
        "sources": config.sources,
        "vocab_size": config.vocab_size,
        "rows": rows,
    }
    path = Path(config.results_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    log(f"wrote {config.results_path}")


if __name__ == "__main__":
    run_script(main)
