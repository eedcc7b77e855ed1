"""A run of preprocessing: its growing files, its progress, and how the same command resumes a killed run."""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from preprocess_data.pipeline.chunks import Chunk, EncodedChunk
from preprocess_data.pipeline.counts import RecordCounts
from preprocess_data.pipeline.dedup import Dedup, drop_duplicates
from preprocess_data.pipeline.encode import SPLITS
from preprocess_data.pipeline.token_writer import TokenWriter
from utils.atomic import GrowingFile, partial, sync_folder, write_text
from utils.errors import DISK_FULL, UserError
from utils.tokenizer import Tokenizer

TOKEN_SUFFIXES = (".bin", ".mask.bin", ".docs.npy")


@dataclass
class PrepareProgress:
    """The progress of a run: the next chunk of the input, the counts, and the sizes of the files."""

    fingerprint: str
    file: int = 0
    chunk: int = 0
    counts: RecordCounts = field(default_factory=RecordCounts)
    writers: dict[str, dict[str, int]] = field(default_factory=dict)
    rejects: int = 0
    signatures: int = 0
    complete: bool = False  # all files are written and only have to be renamed

    @classmethod
    def from_json(cls, text: str) -> "PrepareProgress":
        """ValueError or TypeError for anything that `to_json` did not write."""
        values = json.loads(text)
        return cls(**{**values, "counts": RecordCounts(**values["counts"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


class PrepareRun:
    """The files of one kind in one folder. As a context it locks the folder, so that no other run writes to it.

    After an error the hidden files remain, for the same command to resume; UserError when the disk is full.
    """

    def __init__(self, folder: Path, kind: str, tokenizer: Tokenizer, fingerprint: str) -> None:
        self.folder = folder
        self.kind = kind
        self.names = {split: f"{kind}_{split}" for split in SPLITS}
        self.rejects_path = folder / f"{kind}_rejects.jsonl"
        self._signatures_path = folder / f"{kind}_signatures"
        self._progress_path = folder / f".{kind}_progress.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / ".preprocess.lock")
        self._acquire()
        self.writers: dict[str, TokenWriter] = {}
        try:
            self.progress = self._load_progress(fingerprint)
            if not self.progress.complete:
                self._open_files(tokenizer)
        except BaseException:
            self._lock.release()
            raise

    def _acquire(self) -> None:
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"another run is writing to {self.folder}: wait for it, or choose another --data_path"
            ) from None

    def _load_progress(self, fingerprint: str) -> PrepareProgress:
        try:
            progress = PrepareProgress.from_json(self._progress_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError):
            return PrepareProgress(fingerprint)
        if progress.complete and progress.fingerprint != fingerprint:  # of another run, which only has to be renamed
            self.progress = progress
            self.publish()
        if progress.fingerprint != fingerprint:
            self._progress_path.unlink(missing_ok=True)  # its files are about to be truncated
            return PrepareProgress(fingerprint)
        return progress

    def _open_files(self, tokenizer: Tokenizer) -> None:
        try:
            for split, name in self.names.items():
                state = self.progress.writers.get(split)
                self.writers[split] = TokenWriter(self.folder, name, tokenizer, self.kind == "sft", state)
            self.rejects = GrowingFile(self.rejects_path, self.progress.rejects)
            self.signatures = GrowingFile(self._signatures_path, self.progress.signatures)
        except UserError as error:
            raise UserError(f"{error}: delete {self._progress_path} to start again") from None
        self.seen = self._read_signatures()

    def _read_signatures(self) -> Dedup:
        """The documents that are written already, by their signatures, each preceded by its length."""
        seen = Dedup()
        with open(partial(self._signatures_path), "rb") as file:
            while length := file.read(1):
                seen.reason(file.read(length[0]))
        return seen

    @property
    def tokens(self) -> int:
        return sum(writer.tokens for writer in self.writers.values())

    def add(self, chunk: Chunk, encoded: EncodedChunk, dedup: bool = False) -> None:
        """Append the documents of a chunk, in the order of the input."""
        if dedup:
            kept = drop_duplicates(encoded, self.seen)
            self.signatures.write(b"".join(bytes([len(signature)]) + signature for signature in kept))
        for split, documents in encoded.splits.items():
            self.writers[split].add(documents.tokens, documents.lengths, documents.characters.sum(), documents.mask)
        rejects = [
            {"file": chunk.path, "line": line, "reason": invalid.reason, "record": invalid.record}
            for line, invalid in encoded.invalid
        ]
        if rejects:
            self.rejects.write("".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects).encode())
        self.progress.file = chunk.file
        self.progress.chunk = chunk.index + 1
        invalid_counts = Counter(invalid.reason for _, invalid in encoded.invalid)
        self.progress.counts.add(chunk.source, encoded.consumed, encoded.filtered, invalid_counts, encoded.unread)

    def save(self) -> None:
        """Make this the point from which a killed run resumes."""
        self.progress.writers = {split: writer.sync() for split, writer in self.writers.items()}
        self.progress.rejects = self.rejects.sync()
        self.progress.signatures = self.signatures.sync()
        write_text(self._progress_path, self.progress.to_json())

    def finish(self, **meta: Any) -> None:
        """Write the meta files; then all files are complete and only have to be renamed."""
        counts = self.progress.counts
        reasons = {"dropped": dict(sorted(counts.filtered.items())), "bad": dict(sorted(counts.invalid.items()))}
        if counts.unread:
            reasons["unread"] = dict(sorted(counts.unread.items()))
        for writer in self.writers.values():
            writer.finish(kind=self.kind, **meta, **reasons)
        self.rejects.sync()
        self.progress.complete = True
        write_text(self._progress_path, self.progress.to_json())

    def publish(self) -> dict[str, dict[str, Any]]:
        """Rename the files, the meta files last, and return the metas; after a kill in between the next run does it."""
        metas = [self.folder / f"{name}.meta.json" for name in self.names.values()]
        for meta in metas:
            if partial(meta).exists():
                meta.unlink(missing_ok=True)
        if not self.progress.rejects:
            partial(self.rejects_path).unlink(missing_ok=True)
            self.rejects_path.unlink(missing_ok=True)
        paths = [self.folder / f"{name}{suffix}" for name in self.names.values() for suffix in TOKEN_SUFFIXES]
        for path in (*paths, self.rejects_path, *metas):
            if partial(path).exists():
                os.replace(partial(path), path)
        sync_folder(self.folder)
        self._forget()
        return {meta.name.removesuffix(".meta.json"): json.loads(meta.read_text(encoding="utf-8")) for meta in metas}

    def discard(self) -> None:
        """Remove all files of the run but the list of its rejects, if there are any."""
        for name in self.names.values():
            for suffix in (".bin", ".mask.bin"):
                partial(self.folder / f"{name}{suffix}").unlink(missing_ok=True)
        if not self.progress.rejects:
            partial(self.rejects_path).unlink(missing_ok=True)
        self._forget()

    def _forget(self) -> None:
        for name in self.names.values():
            partial(self.folder / f"{name}.starts").unlink(missing_ok=True)
        partial(self._signatures_path).unlink(missing_ok=True)
        self._progress_path.unlink(missing_ok=True)

    def __enter__(self) -> "PrepareRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for writer in self.writers.values():
            writer.close()
        if self.writers:
            self.rejects.close()
            self.signatures.close()
        self._lock.release()
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise UserError(
                f"the disk of {self.folder} is full: make room and run the same command again, it resumes"
            ) from None
