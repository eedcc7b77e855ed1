"""Corpora by name: where each lies, which field holds its text, and the command that brings it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from preprocess_data.corpora import idioms, poems
from preprocess_data.readers.chat import to_messages
from preprocess_data.readers.files import InvalidRecord, data_files, find_files, read_file
from utils.errors import UserError
from utils.files import project_path

CORPORA_PATH = "output/corpora"


@dataclass(frozen=True)
class Field:
    """Takes the text from one field of a record."""

    name: str

    def __call__(self, record) -> str | InvalidRecord:
        if isinstance(record, str):
            return record
        text = record.get(self.name) if isinstance(record, dict) else None
        return text if isinstance(text, str) else InvalidRecord(f"no text in the field {self.name!r}")


@dataclass(frozen=True)
class Row:
    """Builds the text of a record whose fields are known."""

    document: Callable

    def __call__(self, record) -> str | InvalidRecord:
        try:
            return self.document(record)
        except (KeyError, TypeError, AttributeError):
            return InvalidRecord("missing fields")


@dataclass(frozen=True)
class Corpus:
    """A named corpus. `take` makes the document of a record; chat corpora have none, their rows go by their layout."""

    files: str  # below the corpora folder: a file or a folder
    fetch: str  # the command that brings it
    take: Callable | None = None


CORPORA = {
    "wikipedia-cn": Corpus("wikipedia-cn", "bash preprocess_data/download_tokenizer_data.sh", Field("completion")),
    "seq-monkey": Corpus("seq-monkey", "bash preprocess_data/download_pretrain_data.sh", Field("text")),
    "poems": Corpus("poems.jsonl", "python preprocess_data/preprocess_data.py fetch poems", Row(poems.document)),
    "idioms": Corpus("idioms.jsonl", "python preprocess_data/preprocess_data.py fetch idioms", Row(idioms.document)),
    "deepctrl-sft": Corpus("deepctrl-sft", "bash preprocess_data/download_sft_data.sh"),
    "demo-chat": Corpus("demo-chat.jsonl", "python preprocess_data/preprocess_data.py fetch demo-chat"),
}


@dataclass(frozen=True)
class Source:
    """One input of a run: its name, its files, and the function from record to text (None for chat rows)."""

    name: str
    files: list[Path]
    take: Callable | None

    def texts(self) -> Iterator[str | InvalidRecord]:
        """What a tokenizer would see: documents, or the contents of chat rows."""
        for path in self.files:
            for part in read_file(path):
                for _, record in part.records():
                    if isinstance(record, InvalidRecord):
                        yield record
                    elif self.take is not None:
                        yield self.take(record)
                    elif isinstance(found := to_messages(record), InvalidRecord):
                        yield found
                    else:
                        yield from (message["content"] for message in found[0])


def find_sources(sources: str, corpora_path: Path, text_field: str = "text", chat: bool = False) -> list[Source]:
    """The inputs named by a comma-separated list of corpora, files, folders and globs; empty: every corpus there is.

    UserError when one is missing, with the command that fetches it.
    """
    named = {name: corpus for name, corpus in CORPORA.items() if (corpus.take is None) == chat}
    if not sources:
        there = [name for name, corpus in named.items() if _present(corpora_path / corpus.files)]
        if not there:
            first = named["demo-chat" if chat else "poems"].fetch
            other = named["deepctrl-sft" if chat else "seq-monkey"].fetch
            raise UserError(
                f"no {'chat rows' if chat else 'text'} in {corpora_path}: run {first} (small) or {other} "
                "(large), or name your own file with --sources=FILE"
            )
        return [_named(name, named, corpora_path) for name in there]
    found = [
        _named(name, named, corpora_path)
        if name in CORPORA
        else Source(name, find_files(project_path(name)), None if chat else Field(text_field))
        for name in filter(None, map(str.strip, sources.split(",")))
    ]
    files = [file for source in found for file in source.files]
    if not files:
        raise UserError(f"--sources={sources} names nothing: give corpora, files, folders or globs, by commas")
    if twice := {str(file) for file in files if files.count(file) > 1}:
        raise UserError(f"--sources={sources} names {min(twice)} twice: every document of it would be written twice")
    return found


def _present(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and bool(data_files(path)))


def _named(name: str, named: dict[str, Corpus], corpora_path: Path) -> Source:
    if name not in named:
        raise UserError(
            f"{name} is {'text' if CORPORA[name].take else 'chat rows'}: "
            f"use it with {'pretrain' if CORPORA[name].take else 'sft'}"
        )
    corpus = named[name]
    if not _present(corpora_path / corpus.files):
        raise UserError(f"the corpus {name} is not in {corpora_path}: run {corpus.fetch}")
    return Source(name, find_files(str(corpora_path / corpus.files)), corpus.take)
