"""Corpora by name: where each is stored, how a record becomes text, and the command that fetches it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess_data.corpora import idioms, poems
from preprocess_data.readers.chat import to_messages
from preprocess_data.readers.files import data_files, find_files, read_file
from preprocess_data.readers.records import InvalidRecord
from utils.errors import UserError
from utils.files import project_path

CORPORA_PATH = "output/corpora"
ToText = Callable[[Any], str | InvalidRecord]  # makes the text of a record


@dataclass(frozen=True)
class TextField:
    """The text of a record is one of its fields; a record that is a string is its own text."""

    name: str

    def __call__(self, record: Any) -> str | InvalidRecord:
        if isinstance(record, str):
            return record
        text = record.get(self.name) if isinstance(record, dict) else None
        return text if isinstance(text, str) else InvalidRecord(f"no text in the field {self.name!r}")


@dataclass(frozen=True)
class BuiltText:
    """The text of a record is built from several known fields."""

    build: Callable[[dict[str, Any]], str]

    def __call__(self, record: Any) -> str | InvalidRecord:
        try:
            return self.build(record)
        except (KeyError, TypeError, AttributeError):
            return InvalidRecord("missing fields")


@dataclass(frozen=True)
class Corpus:
    """A named corpus. `to_text` makes the text of a record; it is None for chat corpora, whose layout is detected."""

    files: str  # below the corpora folder: a file or a folder
    fetch: str  # command
    to_text: ToText | None = None


CORPORA = {
    "wikipedia-cn": Corpus("wikipedia-cn", "bash preprocess_data/download_tokenizer_data.sh", TextField("completion")),
    "seq-monkey": Corpus("seq-monkey", "bash preprocess_data/download_pretrain_data.sh", TextField("text")),
    "poems": Corpus("poems.jsonl", "python preprocess_data/preprocess_data.py fetch poems", BuiltText(poems.document)),
    "idioms": Corpus(
        "idioms.jsonl", "python preprocess_data/preprocess_data.py fetch idioms", BuiltText(idioms.document)
    ),
    "deepctrl-sft": Corpus("deepctrl-sft", "bash preprocess_data/download_sft_data.sh"),
    "demo-chat": Corpus("demo-chat.jsonl", "python preprocess_data/preprocess_data.py fetch demo-chat"),
}


@dataclass(frozen=True)
class Source:
    """One input of a run: its name, its files, and the function from record to text (None for chat examples)."""

    name: str
    files: list[Path]
    to_text: ToText | None

    def texts(self) -> Iterator[str | InvalidRecord]:
        """The texts that a tokenizer sees: documents, or the contents of chat messages."""
        for path in self.files:
            for chunk in read_file(path):
                for _, record in chunk.records():
                    if isinstance(record, InvalidRecord):
                        yield record
                    elif self.to_text is not None:
                        yield self.to_text(record)
                    elif isinstance(found := to_messages(record), InvalidRecord):
                        yield found
                    else:
                        yield from (message["content"] for message in found.messages)


def find_sources(sources: str, corpora_path: Path, text_field: str = "text", chat: bool = False) -> list[Source]:
    """The inputs named by a comma-separated list of corpora, files, folders and globs; empty: all present corpora.

    UserError when one is missing, with the command that fetches it.
    """
    named = {name: corpus for name, corpus in CORPORA.items() if (corpus.to_text is None) == chat}
    if not sources:
        present = [name for name, corpus in named.items() if _is_present(corpora_path / corpus.files)]
        if not present:
            small = named["demo-chat" if chat else "poems"].fetch
            large = named["deepctrl-sft" if chat else "seq-monkey"].fetch
            raise UserError(
                f"no {'chat examples' if chat else 'text'} in {corpora_path}: run {small} (small) or {large} "
                "(large), or name your own file with --sources=FILE"
            )
        return [_named_source(name, named, corpora_path) for name in present]
    found = [
        _named_source(name, named, corpora_path)
        if name in CORPORA
        else Source(name, find_files(project_path(name)), None if chat else TextField(text_field))
        for name in filter(None, map(str.strip, sources.split(",")))
    ]
    files = [file for source in found for file in source.files]
    if not files:
        raise UserError(f"--sources={sources} names nothing: give corpora, files, folders or globs, by commas")
    if duplicates := {str(file) for file in files if files.count(file) > 1}:
        raise UserError(f"--sources={sources} names {min(duplicates)} twice: all its documents would be written twice")
    return found


def _is_present(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and bool(data_files(path)))


def _named_source(name: str, named: dict[str, Corpus], corpora_path: Path) -> Source:
    if name not in named:
        raise UserError(
            f"{name} is {'text' if CORPORA[name].to_text else 'chat examples'}: "
            f"use it with {'pretrain' if CORPORA[name].to_text else 'sft'}"
        )
    corpus = named[name]
    if not _is_present(corpora_path / corpus.files):
        raise UserError(f"the corpus {name} is not in {corpora_path}: run {corpus.fetch}")
    return Source(name, find_files(str(corpora_path / corpus.files)), corpus.to_text)
