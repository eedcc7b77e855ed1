"""Raw text to token files.

Inside this folder, or from the root as preprocess_data/preprocess_data.py:

python preprocess_data.py                        # pretrain and sft, for the corpora that are there
python preprocess_data.py fetch poems            # an embedded corpus: poems, idioms, demo-chat
python preprocess_data.py pretrain --sources=wikipedia-cn,my.jsonl --text_field=text
python preprocess_data.py sft --sources=deepctrl-sft
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if not __package__:
    # Run as a script, Python looks in this folder first, where preprocess_data is this file and not the package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from preprocess_data.chat_rows import to_messages
from preprocess_data.corpora import CORPORA, CORPORA_PATH, Source, find_sources
from preprocess_data.demo_chat import make_chat
from preprocess_data.encode import ChatEncoder, Limits, TextEncoder, blocks, in_order
from preprocess_data.idioms import fetch_idioms
from preprocess_data.poems import fetch_poems
from preprocess_data.readers import Broken, Position
from preprocess_data.report import write_report
from preprocess_data.write_tokens import TokenWriter, write_jsonl
from utils.config import opt, parse
from utils.errors import UserError, run_script
from utils.log import Progress, format_count, format_seconds, log
from utils.tokenizer import load_tokenizer


@dataclass
class PrepareConfig:
    """Encodes documents (pretrain) or chat rows (sft) into token files."""

    sources: str = opt("", "corpora, files, folders or globs, separated by commas; empty: all in the corpora folder")
    text_field: str = opt("text", "field with the text, in your own jsonl or json files (pretrain)")
    where: str = opt("", "keep records by a field, e.g. form=五言绝句,七言绝句; records without the field are kept")
    max_documents: int = opt(0, "take only the first records of each source; 0 takes all")
    min_characters: int = opt(1, "drop shorter documents")
    max_characters: int = opt(0, "drop longer documents; 0 keeps all")
    corpora_path: str = opt(CORPORA_PATH, "folder with the named corpora", path=True)
    tokenizer_path: str = opt("output/tokenizer", "folder of the tokenizer", path=True)
    data_path: str = opt("output/data", "folder to write", path=True)
    workers: int = opt(0, "processes; 0 takes every core. The output is the same for any number")


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

    limits = Limits(config.min_characters, config.max_characters)
    make_encoder = partial(ChatEncoder if chat else TextEncoder, tokenizer_path, limits)
    dropped, records = Counter(), 0
    progress = ReadingProgress(kind, sources)
    items = records_of(sources, config, progress.position, dropped)
    with (
        TokenWriter(folder, f"{kind}_train", tokenizer, chat) as train,
        TokenWriter(folder, f"{kind}_val", tokenizer, chat) as val,
    ):
        for block in in_order(make_encoder, blocks(items, _size), config.workers):
            for writer, split in ((train, "train"), (val, "val")):
                part = block.splits[split]
                writer.add(part.tokens, part.lengths, part.characters, part.mask)
            dropped.update(block.dropped)
            records += block.records
            progress.update(train.tokens + val.tokens)
        progress.close()
        if not train.tokens:
            lost = f"nothing left to write of {records} records ({_reasons(dropped)})"
            raise UserError(f"{lost}: check --sources, --text_field and --where")
        files = [str(file) for source in sources for file in source.files]
        meta = {"kind": kind, "sources": files, "dropped": dict(sorted(dropped.items()))}
        metas = {writer.name: writer.finish(**meta) for writer in (train, val)}
    for name, meta in metas.items():
        count, what = meta["documents"], "conversations" if chat else "documents"
        tokens = format_count(meta["tokens"])
        log(f"{name}: {count} {what}, {tokens} tokens, {meta['tokens'] / max(1, count):.1f} each")
    log(f"dropped: {_reasons(dropped)}. {format_seconds(progress.seconds())}")
    log(f"report: {write_report(folder, kind, tokenizer)}")
    return metas


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


def records_of(sources: list[Source], config: PrepareConfig, position: Position, dropped: Counter) -> Iterator:
    """Texts, or conversations, of all sources one after another, filtered as the config says."""
    key, _, wanted = config.where.partition("=")
    values = set(wanted.split(","))
    for source in sources:
        taken = 0
        for record in source.records(position):
            if key and isinstance(record, dict) and key in record and str(record[key]) not in values:
                dropped[f"not {config.where}"] += 1
                continue
            if config.max_documents and taken >= config.max_documents:
                break
            taken += 1
            if source.take is None:
                yield to_messages(record)
            else:
                yield record if isinstance(record, Broken) else source.take(record)


def _size(item) -> int:
    """Characters of a text or a conversation, to cut the work into even blocks."""
    if isinstance(item, Broken):
        return 0
    return len(item) if isinstance(item, str) else sum(len(message["content"]) for message in item[0])


def _reasons(dropped: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "nothing"


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
    log(f"dropped: {_reasons(dropped)}")


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
