"""Raw text to token files.

Inside this folder, or from the root as preprocess_data/preprocess_data.py:

python preprocess_data.py                        # pretrain and sft, for the corpora that are there
python preprocess_data.py fetch poems            # an embedded corpus: poems, idioms, demo-chat
python preprocess_data.py pretrain --sources=wikipedia-cn,my.jsonl --text_field=text
python preprocess_data.py sft --sources=deepctrl-sft
"""

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

if not __package__:
    # Run as a script, Python looks in this folder first, where preprocess_data is this file and not the package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from preprocess_data.corpora.demo_chat import make_chat
from preprocess_data.corpora.idioms import fetch_idioms
from preprocess_data.corpora.poems import fetch_poems
from preprocess_data.corpora.registry import CORPORA, CORPORA_PATH, Source, find_sources
from preprocess_data.pipeline.dedup import KINDS
from preprocess_data.pipeline.encode import Block, Item, Recipe, Workers, encode
from preprocess_data.pipeline.fast_encoder import REFERENCE, choose_encoder, described
from preprocess_data.pipeline.filters import Filters
from preprocess_data.pipeline.report import load_drawing, write_report
from preprocess_data.pipeline.resume import JUDGED, Run, State, reasons
from preprocess_data.pipeline.write_tokens import partial, write_jsonl
from preprocess_data.readers.files import BLOCK, LONGEST, ROWS, Position, read_file
from utils.config import opt, parse
from utils.errors import UserError, run_script
from utils.log import Progress, format_count, format_seconds, log
from utils.tokenizer import Tokenizer, load_tokenizer

SAVE_SECONDS = 2.0  # between two points from which a killed run can go on


@dataclass
class PrepareConfig:
    """Encodes documents (pretrain) or chat rows (sft) into token files."""

    sources: str = opt("", "corpora, files, folders or globs, separated by commas; empty: all in the corpora folder")
    text_field: str = opt("text", "field with the text, in your own jsonl or json files (pretrain)")
    where: str = opt("", "keep records by a field, e.g. form=五言绝句,七言绝句; records without the field are kept")
    max_documents: int = opt(0, "take only the first records of each source; 0 takes all")
    min_characters: int = opt(1, "drop shorter documents")
    max_characters: int = opt(0, "drop longer documents; 0 keeps all")
    language: str = opt("", "keep documents in these scripts, e.g. zh or zh,latin; empty keeps all")
    dedup: str = opt("none", "drop documents that came before: exact, or near (most of the text)", ("none", *KINDS))
    encoder: str = opt("auto", "auto: gigatoken where it gives the ids of tokenizers", ("auto", REFERENCE))
    max_bad_ratio: float = opt(0.001, "stop when a larger share of the records is bad; 1 never stops", neutral=True)
    corpora_path: str = opt(CORPORA_PATH, "folder with the named corpora", path=True, neutral=True)
    tokenizer_path: str = opt("output/tokenizer", "folder of the tokenizer", path=True, neutral=True)
    data_path: str = opt("output/data", "folder to write", path=True, neutral=True)
    workers: int = opt(0, "processes; 0 takes every core. The output is the same for any number", neutral=True)

    def __post_init__(self):
        if not 0 <= self.max_bad_ratio <= 1:
            raise UserError(f"--max_bad_ratio={self.max_bad_ratio}: must be between 0 and 1")
        if self.max_documents < 0:
            raise UserError(f"--max_documents={self.max_documents}: must be at least 0, which takes all")
        if self.where and "=" not in self.where:
            raise UserError(f"--where={self.where}: is written FIELD=VALUE,VALUE")


@dataclass
class FetchConfig:
    """Fetches an embedded corpus: poems, idioms, or demo-chat (chat rows made from the two)."""

    corpora_path: str = opt(CORPORA_PATH, "folder to write", path=True)
    rows: int = opt(60_000, "chat rows for training (demo-chat)")

    def __post_init__(self):
        if self.rows < 1:
            raise UserError(f"--rows={self.rows}: must be at least 1")


def prepare(kind: str, config: PrepareConfig) -> dict[str, dict]:
    """Encode every record of the sources into `<kind>_train` and `<kind>_val`; returns the meta of each."""
    chat = kind == "sft"
    sources = find_sources(config.sources, Path(config.corpora_path), config.text_field, chat)
    tokenizer_path, folder = Path(config.tokenizer_path), Path(config.data_path)
    tokenizer = load_tokenizer(tokenizer_path)
    log(f"{kind}: {', '.join(source.name for source in sources)} -> {config.data_path}")
    filters = Filters(config.min_characters, config.max_characters, config.language)
    # Only so many: where no record has a text, all of the corpus would be searched for one.
    found = islice((text for source in sources for text in source.texts()), JUDGED)
    texts = (text for text in found if isinstance(text, str))
    with Workers(config.workers) as workers:  # they start while the encoder is chosen
        library, why = choose_encoder(tokenizer, config.encoder, texts)
        log(f"encoder: {library}, {why}")
        recipe = Recipe(chat, tokenizer_path, filters, config.where, config.dedup, library, tokenizer.fingerprint)
        with Run(folder, kind, tokenizer, fingerprint(kind, sources, config, tokenizer, library)) as run:
            if not run.state.complete:
                about = {"encoder": described(library), "encoder_because": why}
                encode_all(run, recipe, workers, sources, config, about)
            metas = run.publish()
    for name, meta in metas.items():
        count, what = meta["documents"], "conversations" if chat else "documents"
        tokens = format_count(meta["tokens"])
        log(f"{name}: {count} {what}, {tokens} tokens, {meta['tokens'] / max(1, count):.1f} each")
    dropped, bad = (metas[f"{kind}_train"][key] for key in ("dropped", "bad"))
    log(f"dropped: {reasons(dropped)}")
    if bad:
        log(f"bad: {reasons(bad)}; each with its place in {folder / f'{kind}_rejects.jsonl'}")
    log(f"report: {write_report(folder, kind, tokenizer)}")
    return metas


def encode_all(
    run: Run, recipe: Recipe, workers: Workers, sources: list[Source], config: PrepareConfig, about: dict
) -> None:
    """Encode what the run has not encoded yet, and make it complete, with `about` in its meta files."""
    state, most = run.state, config.max_documents
    if records := sum(state.taken.values()):
        log(f"{run.kind}: going on after {records} records")
    load_drawing()
    progress = ReadingProgress(run.kind, sources)
    items = items_of(sources, state, most, progress.position)
    saved = time.time()
    for item, block in workers.in_order(recipe, items):
        left = most - state.taken.get(item.source, 0)
        if most and block.taken > left:
            block = encode(recipe, item, left) if left else Block()
        run.add(item, block, config.dedup != "none")
        too_bad = state.too_bad(config.max_bad_ratio, at_end=False)
        if too_bad or time.time() - saved > SAVE_SECONDS:
            run.save()
            saved = time.time()
        if too_bad:
            break
        progress.update(run.tokens)
    run.save()
    progress.close()
    if not run.writers["train"].tokens:
        lost = {**state.dropped, **state.bad}
        run.discard()
        raise UserError(
            f"nothing left to write of {sum(state.taken.values())} records ({reasons(lost)}): "
            "check --sources, --text_field and --where"
        )
    if state.too_bad(config.max_bad_ratio, at_end=True):
        raise UserError(
            f"{state.bad_share(config.max_bad_ratio)}, see {partial(run.rejects_path)}: "
            "mend the input, or raise --max_bad_ratio and it goes on from here"
        )
    run.finish(sources=[str(file) for source in sources for file in source.files], **about)
    log(f"{run.kind}: {format_seconds(progress.seconds())}")


def fingerprint(kind: str, sources: list[Source], config: PrepareConfig, tokenizer: Tokenizer, library: str) -> str:
    """What the tokens depend on: a run goes on from where another stopped only where this is the same."""
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for s in sources for file in s.files]
    settings = {f.name: getattr(config, f.name) for f in fields(config) if not f.metadata["neutral"]}
    names = [source.name for source in sources]
    what = json.dumps([kind, names, files, settings, tokenizer.fingerprint, library, BLOCK, LONGEST, ROWS])
    return hashlib.sha256(what.encode()).hexdigest()


def items_of(sources: list[Source], state: State, most: int, position: Position) -> Iterator[Item]:
    """The parts of all files that are still to be encoded, with their places."""
    number, first = -1, (state.file, state.part)
    for source in sources:
        for file in source.files:
            number += 1
            if number < first[0] or most and state.taken.get(source.name, 0) >= most:
                position.done += file.stat().st_size
                continue
            skip = first[1] if number == first[0] else 0
            for part, data in enumerate(read_file(file, position)):
                if part >= skip:
                    yield Item(source.name, number, part, str(file), data, source.take)
                if most and state.taken.get(source.name, 0) >= most:
                    break


class ReadingProgress:
    """How much of the input has been read, and how fast the tokens come; off a terminal a line every few seconds."""

    def __init__(self, kind: str, sources: list[Source]):
        self.position, self.start, self.said = Position(), time.time(), time.time()
        megabytes = sum(file.stat().st_size for source in sources for file in source.files) >> 20
        self.bar = Progress(max(1, megabytes), label=f"{kind}, MB")
        self.close = self.bar.close

    def seconds(self) -> float:
        return time.time() - self.start

    def update(self, tokens: int) -> None:
        text = None
        if time.time() - self.said > 5:
            self.said = time.time()
            text = f"{format_count(tokens)} tokens, {format_count(tokens / self.seconds())}/s"
        self.bar.update(self.position.done >> 20, text)


def fetch(name: str, config: FetchConfig) -> None:
    """Bring an embedded corpus and write it as jsonl."""
    folder, start = Path(config.corpora_path), time.time()
    if name == "demo-chat":
        rows, dropped = make_chat(folder, config.rows), Counter()
    else:
        rows, dropped = FETCHERS[name](folder / "downloads")
    path = folder / CORPORA[name].files
    write_jsonl(path, rows)
    log(f"{name}: {len(rows)} rows in {config.corpora_path}/{path.name}. {format_seconds(time.time() - start)}")
    log(f"dropped: {reasons(dropped)}")


FETCHERS = {"poems": fetch_poems, "idioms": fetch_idioms}


def main(argv: list[str] | None = None) -> None:
    argv = ["--help" if word == "-h" else word for word in (sys.argv[1:] if argv is None else argv)]
    command = argv.pop(0) if argv and not argv[0].startswith("--") else ""
    if command == "fetch":
        names = [*FETCHERS, "demo-chat"]
        name = argv.pop(0) if argv and not argv[0].startswith("--") else ""
        if "--help" in argv or name in names:
            fetch(name, parse(FetchConfig, argv))
        else:
            raise UserError(f"fetch {name or 'what'}? One of: {', '.join(names)}")
    elif command in ("pretrain", "sft"):
        prepare(command, parse(PrepareConfig, argv))
    elif not command:
        if "--help" in argv:
            log(__doc__)
        config = parse(PrepareConfig, argv)
        if config.sources:
            raise UserError("--sources needs to know what for: preprocess_data.py pretrain --sources=..., or sft")
        prepare_what_is_there(config)
    else:
        raise UserError(f"unknown command {command}: one of fetch, pretrain, sft, or none for pretrain and sft")


def prepare_what_is_there(config: PrepareConfig) -> None:
    """Both stages; a stage without any corpus is skipped as long as the other has one."""
    done = []
    for kind, other in (("pretrain", True), ("sft", False)):
        try:
            find_sources("", Path(config.corpora_path), chat=kind == "sft")
        except UserError as error:
            if other or done:
                log(f"{kind}: skipped, {error}")
                continue
            raise
        done.append(prepare(kind, config))


if __name__ == "__main__":
    run_script(main)
