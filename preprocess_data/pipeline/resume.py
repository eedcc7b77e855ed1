"""A run of preprocessing: its files while they grow, how far it has come, and how a killed one goes on from there."""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from preprocess_data.pipeline.dedup import Dedup
from preprocess_data.pipeline.encode import SPLITS, Block, Item, drop_duplicates
from preprocess_data.pipeline.write_tokens import GrowingFile, TokenWriter, partial, write_atomically
from utils.errors import DISK_FULL, UserError
from utils.tokenizer import Tokenizer

try:
    import fcntl
except ImportError:  # no locks on Windows
    fcntl = None

JUDGED = 10_000  # records before the share of bad ones says something; at the end it is judged in any case


@dataclass
class State:
    """How far a run has come: the next part of the input, the counts, and the sizes of its files."""

    fingerprint: str
    file: int = 0
    part: int = 0
    taken: dict[str, int] = field(default_factory=dict)  # records of each source
    dropped: dict[str, int] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    writers: dict[str, dict] = field(default_factory=dict)
    rejects: int = 0
    signatures: int = 0
    complete: bool = False  # all files are written and only have to be renamed

    def too_bad(self, most: float, at_end: bool) -> bool:
        """Whether too large a share of the records is bad."""
        records = sum(self.taken.values())
        return (at_end or records >= JUDGED) and sum(self.bad.values()) > most * records

    def bad_share(self, most: float) -> str:
        """`3 of 200 records are bad, more than --max_bad_ratio=0.001 (3 broken JSON)`."""
        return (
            f"{sum(self.bad.values())} of {sum(self.taken.values())} records are bad, more than "
            f"--max_bad_ratio={most:g} ({reasons(self.bad)})"
        )


class Run:
    """The files of one kind in one folder. As a context it holds the folder, so that no other run writes to it.

    What stops it leaves the hidden files behind, for the same command to go on; UserError when the disk is full.
    """

    def __init__(self, folder: Path, kind: str, tokenizer: Tokenizer, fingerprint: str):
        self.folder, self.kind, self.tokenizer = folder, kind, tokenizer
        self.names = {split: f"{kind}_{split}" for split in SPLITS}
        self.rejects_path = folder / f"{kind}_rejects.jsonl"
        self._signatures_path = folder / f"{kind}_signatures"
        self._progress = folder / f".{kind}_progress.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._hold()
        self.state = self._load(fingerprint)
        self.writers: dict[str, TokenWriter] = {}
        if not self.state.complete:
            self.writers = {
                split: TokenWriter(folder, name, tokenizer, kind == "sft", self.state.writers.get(split))
                for split, name in self.names.items()
            }
            self.rejects = GrowingFile(self.rejects_path, self.state.rejects)
            self.signatures = GrowingFile(self._signatures_path, self.state.signatures)
            self.seen = self._seen()

    def _hold(self) -> int | None:
        """The folder, open and locked; UserError when another run has it."""
        if fcntl is None:
            return None
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise UserError(
                f"another run is writing to {self.folder}: wait for it, or choose another --data_path"
            ) from None
        return lock

    def _load(self, fingerprint: str) -> State:
        try:
            state = State(**json.loads(self._progress.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return State(fingerprint)
        if state.complete and state.fingerprint != fingerprint:  # of another run, which was as good as done
            self.state = state
            self.publish()
        if state.fingerprint != fingerprint:
            self._progress.unlink(missing_ok=True)  # its files are about to be emptied
            return State(fingerprint)
        return state

    def _seen(self) -> Dedup:
        """The documents that are written already, by their signatures, each behind its length."""
        seen = Dedup()
        with open(partial(self._signatures_path), "rb") as file:
            while length := file.read(1):
                seen.reason(file.read(length[0]))
        return seen

    @property
    def tokens(self) -> int:
        return sum(writer.tokens for writer in self.writers.values())

    def add(self, item: Item, block: Block, dedup: bool = False) -> None:
        """Append what became of an item."""
        if dedup:
            new = drop_duplicates(block, self.seen)
            self.signatures.write(b"".join(bytes([len(signature)]) + signature for signature in new))
        for split, part in block.splits.items():
            self.writers[split].add(part.tokens, part.lengths, part.characters.sum(), part.mask)
        rows = [
            {"file": item.path, "line": line, "reason": broken.reason, "record": broken.record}
            for line, broken in block.bad
        ]
        if rows:
            self.rejects.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        state = self.state
        state.file, state.part = item.file, item.part + 1
        state.taken[item.source] = state.taken.get(item.source, 0) + block.taken
        state.dropped = dict(Counter(state.dropped) + block.dropped)
        state.bad = dict(Counter(state.bad) + Counter(broken.reason for _, broken in block.bad))

    def save(self) -> None:
        """Make this the point from which a killed run goes on."""
        self.state.writers = {split: writer.sync() for split, writer in self.writers.items()}
        self.state.rejects, self.state.signatures = self.rejects.sync(), self.signatures.sync()
        write_atomically(self._progress, json.dumps(asdict(self.state), ensure_ascii=False).encode())

    def finish(self, **meta) -> None:
        """Write the meta files: all that is missing then are the names."""
        counts = {key: dict(sorted(getattr(self.state, key).items())) for key in ("dropped", "bad")}
        for writer in self.writers.values():
            writer.finish(kind=self.kind, **meta, **counts)
        self.rejects.sync()
        self.state.complete = True
        write_atomically(self._progress, json.dumps(asdict(self.state), ensure_ascii=False).encode())

    def publish(self) -> dict[str, dict]:
        """Give the files their names, the meta files last; returns the metas. A kill in between is made good later."""
        metas = [self.folder / f"{name}.meta.json" for name in self.names.values()]
        for meta in metas:
            if partial(meta).exists():
                meta.unlink(missing_ok=True)
        if not self.state.rejects:
            partial(self.rejects_path).unlink(missing_ok=True)
            self.rejects_path.unlink(missing_ok=True)
        ends = (".bin", ".mask.bin", ".docs.npy")
        paths = [self.folder / f"{name}{end}" for name in self.names.values() for end in ends]
        for path in (*paths, self.rejects_path, *metas):
            if partial(path).exists():
                os.replace(partial(path), path)
        if self._lock is not None:
            os.fsync(self._lock)
        self._forget()
        return {meta.name.removesuffix(".meta.json"): json.loads(meta.read_text(encoding="utf-8")) for meta in metas}

    def discard(self) -> None:
        """Remove every trace of the run."""
        for name in self.names.values():
            for end in (".bin", ".mask.bin"):
                partial(self.folder / f"{name}{end}").unlink(missing_ok=True)
        partial(self.rejects_path).unlink(missing_ok=True)
        self._forget()

    def _forget(self) -> None:
        for name in self.names.values():
            partial(self.folder / f"{name}.starts").unlink(missing_ok=True)
        partial(self._signatures_path).unlink(missing_ok=True)
        self._progress.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for writer in self.writers.values():
            writer.close()
        if self.writers:
            self.rejects.close()
            self.signatures.close()
        if self._lock is not None:
            os.close(self._lock)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise UserError(
                f"the disk of {self.folder} is full: make room and run the same command again, it goes on"
            ) from None


def reasons(counts: dict[str, int]) -> str:
    """`3 empty, 1 too long`, the commonest first."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(counts).most_common()) or "nothing"
