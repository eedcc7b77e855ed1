"""Trains the tokenizer: byte-level BPE over a stream of documents, saved as a folder that transformers loads as it is.

python train_tokenizer.py                                    # all corpora in output/corpora, 32,000 tokens
python train_tokenizer.py --sources=my.jsonl --vocab_size=8192
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

from preprocess_data.corpora.registry import CORPORA_PATH, Source, find_sources
from preprocess_data.pipeline.counts import RecordCounts, format_reasons
from preprocess_data.pipeline.tokenizer_report import (
    check_round_trip,
    from_tokenizer,
    known_tokenizers,
    write_report,
)
from preprocess_data.pipeline.train_bpe import held_out_texts, save, train, training_texts
from utils.config import check_bounds, opt, parse
from utils.errors import UserError, run_script
from utils.log import log
from utils.tokenizer import Tokenizer

REPORT_DOCUMENTS = 5000
REPORT_LENGTH = 100_000  # characters of each that are looked at


@dataclass
class TokenizerConfig:
    """Trains a byte-level BPE tokenizer."""

    sources: str = opt("", "corpora, files, folders or globs, separated by commas; empty: all in the corpora folder")
    text_field: str = opt("text", "field with the text, in your own jsonl or json files")
    corpora_path: str = opt(CORPORA_PATH, "folder with the named corpora", path=True)
    tokenizer_path: str = opt("output/tokenizer", "folder to write", path=True)
    vocab_size: int = opt(32_000, "tokens, the special ones included", le=1 << 24)
    min_frequency: int = opt(2, "a merge must occur this often", ge=1, lt=1 << 32)
    max_characters: int = opt(
        10_000_000, "limit over all sources, read in turn; takes 0.05 GB of memory and at most 0.2 per million", ge=1
    )
    max_bad_ratio: float = opt(0.001, "stop when a larger share of the records is invalid; 1: never stop", ge=0, le=1)
    split_han: bool = opt(False, "each Chinese character is a token of its own: for verse, whose lines are counted")

    def __post_init__(self) -> None:
        check_bounds(self)


def main(argv: list[str] | None = None) -> None:
    config = parse(TokenizerConfig, argv)
    sources = find_sources(config.sources, Path(config.corpora_path), config.text_field)
    names = ", ".join(source.name for source in sources)
    log(f"training a tokenizer of {config.vocab_size} tokens on {names}")
    counts = RecordCounts()
    texts = training_texts(sources, config.max_characters, config.max_bad_ratio, counts)
    first = next(texts, None)
    if first is None:
        raise UserError(f"no text in {names}: nothing to train a tokenizer on")
    backend = train(itertools.chain([first], texts), config.vocab_size, config.min_frequency, config.split_han)
    if counts.invalid:
        number = sum(counts.invalid.values())
        log(f"skipped {number} invalid of {counts.total()} records: {format_reasons(counts.invalid)}")
    tokenizer = save(backend, Path(config.tokenizer_path))
    if tokenizer.vocab_size < config.vocab_size:
        log(
            f"the tokenizer has {tokenizer.vocab_size} tokens, fewer than requested: the text has no more pairs that "
            f"occur {config.min_frequency} times"
        )
    report(tokenizer, sources, config.max_characters, Path(config.tokenizer_path) / "report.md")
    log(f"wrote {config.tokenizer_path}, {tokenizer.vocab_size} tokens")
    log("next: python preprocess_data/preprocess_data.py")


def report_texts(sources: list[Source], max_characters: int) -> list[str]:
    """Return the first held-out documents, within the same bound of memory as the training."""
    kept: list[str] = []
    n_characters = 0
    for text in itertools.islice(held_out_texts(sources), REPORT_DOCUMENTS):
        kept.append(text[:REPORT_LENGTH])
        n_characters += len(kept[-1])
        if n_characters >= max_characters:
            break
    return kept


def report(tokenizer: Tokenizer, sources: list[Source], max_characters: int, path: Path) -> None:
    """Check the round trip on held-out documents, and write and log the report about them."""
    held_out = report_texts(sources, max_characters)
    if not held_out:
        log("no held-out documents to report on")
        return
    check_round_trip(tokenizer, held_out)
    figures = write_report(
        [from_tokenizer("this one", tokenizer), *known_tokenizers()],
        held_out,
        path,
        f"{', '.join(source.name for source in sources)}: the first {len(held_out)} held-out documents",
    )
    log(f"held out, {len(held_out)} documents, round trip exact:\n{figures}")


if __name__ == "__main__":
    run_script(main)
