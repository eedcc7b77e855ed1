"""The data report: `<kind>_report.md` and a picture next to the token files.

Counts and sizes, filtered and invalid records, lengths of documents, token frequencies, ten sampled documents.
"""

import json
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from preprocess_data.pipeline.counts import format_reasons
from utils.atomic import atomic_write, write_text
from utils.log import format_count
from utils.tokenizer import Tokenizer

SAMPLES = 10
SAMPLE_TOKENS = 300  # of a longer document only the beginning is shown
MAX_PLACES = 3  # files and lines per reason
PERCENTILES = {0: "shortest", 50: "median", 95: "95% at most", 99: "99% at most", 100: "longest"}
MATPLOTLIB = ("matplotlib.figure", "matplotlib.backends.backend_agg")
BLOCK_TOKENS = 1 << 18  # read at once: few enough for the CPU cache


class TokenFileStats:
    """One token file with its side files, read in blocks."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.path = folder / f"{name}.bin"
        self.meta: dict[str, Any] = json.loads((folder / f"{name}.meta.json").read_text(encoding="utf-8"))
        self.dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        starts = np.load(folder / f"{name}.docs.npy", mmap_mode="r").astype(np.int64)
        self.bounds = np.append(starts, self.meta["tokens"])
        self.lengths = np.diff(self.bounds)
        self.with_loss: int | None = None  # tokens that carry loss; None for text
        mask = folder / f"{name}.mask.bin"
        if mask.is_file():
            self.with_loss = sum(int(block.sum()) for block in _blocks(mask, np.dtype(np.uint8)))

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """(V,) how often each token occurs."""
        counts = np.zeros(vocab_size, np.int64)
        for block in _blocks(self.path, self.dtype):
            counts += np.bincount(block, minlength=vocab_size)
        return counts

    def document(self, index: int, limit: int) -> list[int]:
        """The first `limit` tokens of a document."""
        start = int(self.bounds[index])
        count = int(min(limit, self.lengths[index]))
        return np.fromfile(self.path, self.dtype, count, offset=start * self.dtype.itemsize).tolist()


def _blocks(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while len(block := np.fromfile(file, dtype, BLOCK_TOKENS)):
            yield block


def preload_matplotlib() -> None:
    """Import matplotlib in the background: the import takes as long as the rest of a report."""
    threading.Thread(target=lambda: list(map(import_module, MATPLOTLIB)), daemon=True).start()


def write_report(folder: Path, kind: str, tokenizer: Tokenizer, seed: int = 1) -> Path:
    """Describe `<kind>_train` and `<kind>_val`, and return the path of the report.

    If `<kind>_rejects.jsonl` lists {"file", "line", "reason"}, the reasons are shown with places in the input.
    """
    splits = [TokenFileStats(folder, f"{kind}_{split}") for split in ("train", "val")]
    counts = np.sum([split.token_counts(tokenizer.vocab_size) for split in splits], axis=0)
    picture = f"{kind}_report.png"
    with atomic_write(folder / picture) as temporary:
        draw(splits, counts, temporary)
    text = "\n\n".join(
        [
            f"# Data report: {kind}",
            _sizes(splits),
            f"![document lengths and token frequencies]({picture})",
            _tokens(counts, tokenizer),
            "## Filtered and invalid records",
            _unused_records(splits[0].meta, folder / f"{kind}_rejects.jsonl"),
            f"## {SAMPLES} documents sampled with seed {seed}",
            *_samples(splits[0], tokenizer, seed),
        ]
    )
    path = folder / f"{kind}_report.md"
    write_text(path, text + "\n")
    return path


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _sizes(splits: list[TokenFileStats]) -> str:
    rows = [["", *(split.name for split in splits)]]
    for key in ("documents", "tokens", "characters"):
        rows.append([key, *(f"{split.meta[key]:,}" for split in splits)])
    if splits[0].with_loss is not None:
        rows.append(["tokens with loss", *(_share(split.with_loss or 0, split.meta["tokens"]) for split in splits)])
    else:
        ratios = [split.meta["characters"] / max(1, split.meta["tokens"]) for split in splits]
        rows.append(["characters per token", *(f"{ratio:.3f}" for ratio in ratios)])
    rows.append(["file, MB", *(f"{split.path.stat().st_size / 1e6:,.1f}" for split in splits)])
    for percentile, name in PERCENTILES.items():
        values = [
            np.percentile(split.lengths, percentile, method="lower") if len(split.lengths) else 0 for split in splits
        ]
        rows.append([f"tokens per document, {name}", *(f"{value:,}" for value in values)])
    return _table(rows)


def _share(part: int, total: int) -> str:
    return f"{part:,} ({part / max(1, total):.1%})"


def _tokens(counts: np.ndarray, tokenizer: Tokenizer) -> str:
    unused = int((counts == 0).sum())
    top = ", ".join(
        f"``{tokenizer.decode([int(i)], skip_special=False)!r}`` {counts[i] / counts.sum():.1%}"
        for i in np.argsort(-counts, kind="stable")[:10]
    )
    return f"{_share(unused, len(counts))} of the {len(counts):,} tokens never occur. The most frequent: {top}."


def _unused_records(meta: dict[str, Any], rejects: Path) -> str:
    """A table of the filtered and the invalid records by reason, and the fields that are left out of others."""
    unread = meta.get("unread", {})
    left_out = f"\n\nFields that are left out, in so many conversations: {format_reasons(unread)}." if unread else ""
    counts: dict[str, int] = {**meta["dropped"], **meta.get("bad", {})}
    if not counts:
        return "None." + left_out
    places: dict[str, list[str]] = {}
    if rejects.is_file():
        with open(rejects, "rb") as file:
            for reject in map(json.loads, file):
                found = places.setdefault(reject["reason"], [])
                if len(found) < MAX_PLACES:
                    found.append(f"{reject['file']}:{reject['line']}")
    rows = [["records", "reason", "for example"]]
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        rows.append([f"{count:,}", reason, ", ".join(places.get(reason, []))])
    return _table(rows) + left_out


def _samples(split: TokenFileStats, tokenizer: Tokenizer, seed: int) -> Iterator[str]:
    """Each document below its number, indented, so that nothing in it is rendered as Markdown."""
    count = len(split.lengths)
    for index in sorted(np.random.default_rng(seed).choice(count, min(SAMPLES, count), replace=False).tolist()):
        ids = split.document(index, SAMPLE_TOKENS)
        more = f", the first {len(ids)} of" if len(ids) < split.lengths[index] else ","
        text = tokenizer.decode(ids, skip_special=False)
        yield f"Document {index}{more} {split.lengths[index]} tokens:"
        yield "\n".join("    " + line for line in text.splitlines())


def draw(splits: list[TokenFileStats], counts: np.ndarray, picture: Path) -> None:
    """Two panels: a histogram of document lengths, and token frequencies by rank. counts: (V,)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(10, 4), dpi=100)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, gridspec_kw={"left": 0.07, "right": 0.98, "bottom": 0.13, "top": 0.96})
    lengths = np.concatenate([split.lengths for split in splits])
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, 50).round())
    for split in splits:
        heights, _ = np.histogram(split.lengths, edges)
        left.stairs(heights, edges, label=f"{split.name} ({format_count(len(split.lengths))})")
    left.set(xscale="log", yscale="log", xlabel="tokens per document", ylabel="documents")
    left.legend()
    used = np.sort(counts[counts > 0])[::-1]
    right.plot(np.arange(1, len(used) + 1), used)
    right.set(xscale="log", yscale="log", xlabel="rank of the token", ylabel="occurrences")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        for axis in (axes.xaxis, axes.yaxis):  # the default ticks would take half the time of a report
            axis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_major_formatter(lambda number, position: format_count(number))
            axis.set_minor_locator(NullLocator())
    figure.savefig(picture, format="png")
