"""Preprocessing of one kind: from sources to `<kind>_train` and `<kind>_val`, resumable, with a report."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from preprocess_data.corpora.registry import CORPORA_PATH, Source, find_sources
from preprocess_data.pipeline.chunks import Chunk, EncodedChunk
from preprocess_data.pipeline.counts import MIN_RECORDS, RecordCounts, format_reasons
from preprocess_data.pipeline.dedup import KINDS
from preprocess_data.pipeline.encode import NO_LOSS, EncodeConfig, encode_chunk
from preprocess_data.pipeline.fast_encoder import REFERENCE, choose_encoder, name_and_version
from preprocess_data.pipeline.filters import Filters
from preprocess_data.pipeline.prepare_run import PrepareProgress, PrepareRun
from preprocess_data.pipeline.report import preload_matplotlib, write_report
from preprocess_data.pipeline.workers import Workers
from preprocess_data.readers import records
from preprocess_data.readers.files import Position, read_file
from utils.atomic import partial
from utils.config import check_bounds, opt
from utils.errors import UserError
from utils.log import Progress, format_count, format_seconds, log, warn
from utils.tokenizer import Tokenizer, load_tokenizer

READING = 2  # part of a run's fingerprint: another number when the same input gives other chunks, texts or turns
SAVE_SECONDS = 2.0  # between two points from which a killed run can resume
LOG_SECONDS = 5.0


@dataclass
class PrepareConfig:
    """Encodes documents (pretrain) or chat examples (sft) into token files."""

    sources: str = opt(
        "",
        "corpora, files, folders or globs, separated by commas; empty: all in the corpora folder",
        group="Input",
    )
    text_field: str = opt("text", "field with the text, in your own jsonl or json files (pretrain)")
    where: str = opt("", "keep records by a field, e.g. form=五言绝句,七言绝句; records without the field are kept")
    max_documents: int = opt(0, "only the first records of each source; 0: all", ge=0)
    min_characters: int = opt(1, "drop shorter documents", group="Filters")
    max_characters: int = opt(0, "drop longer documents; 0: keep all")
    language: str = opt("", "keep documents in these scripts, e.g. zh or zh,latin; empty: keep all")
    dedup: str = opt(
        "none", "drop duplicates of earlier documents: exact, or near (most of the text)", ("none", *KINDS)
    )
    encoder: str = opt(
        "auto", "auto: gigatoken if its ids equal those of tokenizers", ("auto", REFERENCE), group="Processing"
    )
    max_bad_ratio: float = opt(
        0.001, "stop when a larger share of the records is invalid; 1: never stop", neutral=True, ge=0, le=1
    )
    workers: int = opt(0, "processes; 0: one per core. The output is the same for any number", neutral=True)
    corpora_path: str = opt(CORPORA_PATH, "folder with the named corpora", path=True, neutral=True, group="Paths")
    tokenizer_path: str = opt("output/tokenizer", "folder of the tokenizer", path=True, neutral=True)
    data_path: str = opt("output/data", "folder to write", path=True, neutral=True)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.where and "=" not in self.where:
            raise UserError(f"--where={self.where}: is written FIELD=VALUE,VALUE")


def prepare(kind: str, config: PrepareConfig) -> dict[str, dict[str, Any]]:
    """Encode the sources into `<kind>_train` and `<kind>_val`; returns the meta of each."""
    chat = kind == "sft"
    sources = find_sources(config.sources, Path(config.corpora_path), config.text_field, chat)
    tokenizer_path = Path(config.tokenizer_path)
    folder = Path(config.data_path)
    tokenizer = load_tokenizer(tokenizer_path)
    log(f"{kind}: {', '.join(source.name for source in sources)} -> {config.data_path}")
    filters = Filters(config.min_characters, config.max_characters, config.language)
    # Limited: if no record has a text, the full corpus would be searched for one.
    first_texts = islice((text for source in sources for text in source.texts()), MIN_RECORDS)
    texts = (text for text in first_texts if isinstance(text, str))
    with Workers(config.workers) as workers:  # they start while the encoder is chosen
        library, reason = choose_encoder(tokenizer, config.encoder, texts)
        log(f"encoder: {library}, {reason}")
        encode_config = EncodeConfig(
            chat, tokenizer_path, filters, config.where, config.dedup, library, tokenizer.fingerprint
        )
        with PrepareRun(folder, kind, tokenizer, run_fingerprint(kind, sources, config, tokenizer, library)) as run:
            if not run.progress.complete:
                encode_all(run, encode_config, workers, sources, config)
                files = [str(file) for source in sources for file in source.files]
                run.finish(sources=files, encoder=name_and_version(library), encoder_because=reason)
            metas = run.publish()
    _log_result(kind, metas, run.rejects_path)
    log(f"report: {write_report(folder, kind, tokenizer)}")
    return metas


def _log_result(kind: str, metas: dict[str, dict[str, Any]], rejects_path: Path) -> None:
    for name, meta in metas.items():
        count = meta["documents"]
        what = "conversations" if kind == "sft" else "documents"
        mean = meta["tokens"] / max(1, count)
        log(f"{name}: {count} {what}, {format_count(meta['tokens'])} tokens, {mean:.1f} per document")
    train = metas[f"{kind}_train"]
    log(f"filtered: {format_reasons(train['dropped'])}")
    if unread := train.get("unread"):
        warn(f"{kind}: fields that are left out, in so many conversations: {format_reasons(unread)}")
    if train["bad"]:
        log(f"invalid: {format_reasons(train['bad'])}; listed with file and line in {rejects_path}")


def encode_all(
    run: PrepareRun, encode_config: EncodeConfig, workers: Workers, sources: list[Source], config: PrepareConfig
) -> None:
    """Encode what the run has not encoded yet; UserError when nothing is left or too many records are invalid."""
    counts = run.progress.counts
    limit = config.max_documents
    start = time.time()
    if total := counts.total():
        log(f"{run.kind}: resuming after {total} records")
    preload_matplotlib()
    bar = ReadingProgress(run.kind, sources)
    saved = time.time()
    for chunk, encoded in workers.encode(encode_config, remaining_chunks(sources, run.progress, limit, bar.position)):
        remaining = limit - counts.consumed.get(chunk.source, 0)
        if limit and encoded.consumed > remaining:
            encoded = encode_chunk(encode_config, chunk, remaining) if remaining else EncodedChunk()
        run.add(chunk, encoded, config.dedup != "none")
        stop = counts.too_many_invalid(config.max_bad_ratio, at_end=False)
        if stop or time.time() - saved > SAVE_SECONDS:
            run.save()
            saved = time.time()
        if stop:
            break
        bar.update(run.tokens)
    run.save()
    bar.close()
    _check_result(run, config.max_bad_ratio)
    log(f"{run.kind}: {format_seconds(time.time() - start)}")


def _check_result(run: PrepareRun, max_bad_ratio: float) -> None:
    counts = run.progress.counts
    if not run.writers["train"].tokens:
        run.discard()
        place = f", listed in {partial(run.rejects_path)}" if counts.invalid else ""
        raise UserError(
            f"nothing left to write of {counts.total()} records "
            f"({format_reasons({**counts.filtered, **counts.invalid})}{place}): {_advice(counts)}"
        )
    if counts.too_many_invalid(max_bad_ratio, at_end=True):
        raise UserError(
            f"{counts.describe_invalid(max_bad_ratio)}, see {partial(run.rejects_path)}: "
            "correct the input, or raise --max_bad_ratio and the same command resumes"
        )


def _advice(counts: RecordCounts) -> str:
    """What to change when no record is left, by the most frequent reason."""
    reasons = {**counts.filtered, **counts.invalid}
    reason = max(reasons, key=lambda name: reasons[name], default="")
    if reason.startswith("no text in the field"):
        return "name the field of the text with --text_field"
    if reason in counts.filtered and reason != NO_LOSS:
        return "check --where, --language, --min_characters and --max_characters"
    return "check --sources; docs/preprocessing.md has what can be read"


def run_fingerprint(kind: str, sources: list[Source], config: PrepareConfig, tokenizer: Tokenizer, library: str) -> str:
    """A hash of everything that the tokens depend on: a run resumes another only if it is the same."""
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for s in sources for file in s.files]
    settings = {f.name: getattr(config, f.name) for f in fields(config) if not f.metadata["neutral"]}
    names = [source.name for source in sources]
    sizes = (records.CHUNK_BYTES, records.MAX_RECORD_BYTES, records.CHUNK_RECORDS)
    parts = json.dumps([READING, kind, names, files, settings, tokenizer.fingerprint, library, *sizes])
    return hashlib.sha256(parts.encode()).hexdigest()


def remaining_chunks(
    sources: list[Source], progress: PrepareProgress, limit: int, position: Position
) -> Iterator[Chunk]:
    """The chunks that are still to be encoded, of at most `limit` records per source (0: all)."""

    def is_full(source: Source) -> bool:
        return limit > 0 and progress.counts.consumed.get(source.name, 0) >= limit

    first_file = progress.file
    first_chunk = progress.chunk
    files = [(source, file) for source in sources for file in source.files]
    for number, (source, file) in enumerate(files):
        if number < first_file or is_full(source):
            position.done += file.stat().st_size
            continue
        done = first_chunk if number == first_file else 0
        for index, data in enumerate(read_file(file, position)):
            if index >= done:
                yield Chunk(source.name, number, index, str(file), data, source.to_text)
            if is_full(source):
                break


class ReadingProgress:
    """A progress bar over the megabytes of the input; not on a terminal, a log line every few seconds."""

    def __init__(self, kind: str, sources: list[Source]) -> None:
        self.position = Position()
        self.start = time.time()
        self.logged = time.time()
        megabytes = sum(file.stat().st_size for source in sources for file in source.files) >> 20
        self.bar = Progress(max(1, megabytes), label=f"{kind}, MB")

    def update(self, tokens: int) -> None:
        now = time.time()
        text = None
        if now - self.logged > LOG_SECONDS:
            self.logged = now
            text = f"{format_count(tokens)} tokens, {format_count(tokens / (now - self.start))}/s"
        self.bar.update(self.position.done >> 20, text)

    def close(self) -> None:
        self.bar.close()
