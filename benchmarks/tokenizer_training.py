"""Tokenizer training: time and peak memory of ours and of the trainer of `tokenizers`, and whether the files are equal.

    python benchmarks/tokenizer_training.py                          poems and idioms, 32,000 tokens
    python benchmarks/tokenizer_training.py --sources=my.jsonl       another corpus

Both read the same documents through the same pipeline, each in a separate process, one after the other, with --compare
characters; then ours alone with the default of train_tokenizer.py. Writes benchmarks/results/tokenizer_training.json.
"""

import hashlib
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tokenizers import Tokenizer as Backend  # noqa: E402

from preprocess_data.corpora.registry import CORPORA_PATH, find_sources  # noqa: E402
from preprocess_data.pipeline import train_bpe  # noqa: E402
from train_tokenizer import TokenizerConfig  # noqa: E402
from utils.config import opt, parse  # noqa: E402
from utils.errors import run_script  # noqa: E402
from utils.log import log  # noqa: E402


@dataclass
class BenchmarkConfig:
    """Measures the training of a tokenizer."""

    sources: str = opt("poems,idioms", "corpora, files, folders or globs, separated by commas")
    corpora_path: str = opt(CORPORA_PATH, "folder with the named corpora", path=True)
    vocab_size: int = opt(32_000, "tokens")
    compare: int = opt(8_000_000, "characters for both trainers; 0: ours alone")
    results_path: str = opt("benchmarks/results/tokenizer_training.json", "file to write", path=True)


def reference(texts: Iterator[str], vocab_size: int, min_frequency: int = 2, split_han: bool = False) -> Backend:
    """The same as train_bpe.train, with the trainer of `tokenizers`."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = train_bpe.training_pre_tokenizer(split_han)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in train_bpe.special_tokens()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = train_bpe.pre_tokenizer()
    return backend


def measure(trainer: str, characters: int, config: BenchmarkConfig) -> dict:
    """Train once, in this process; the peak memory is that of the process."""
    sources = find_sources(config.sources, Path(config.corpora_path))
    lengths = []

    def texts() -> Iterator[str]:
        for text in train_bpe.training_texts(sources, characters):
            lengths.append(len(text))
            yield text

    start = time.monotonic()
    backend = {"ours": train_bpe.train, "tokenizers": reference}[trainer](texts(), config.vocab_size)
    return {
        "trainer": trainer,
        "characters": sum(lengths),
        "documents": len(lengths),
        "seconds": round(time.monotonic() - start, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "sha256": hashlib.sha256(backend.to_str().encode()).hexdigest(),
    }


def main(argv: list[str] | None = None) -> None:
    config = parse(BenchmarkConfig, argv)
    default = TokenizerConfig().max_characters
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
