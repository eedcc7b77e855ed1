"""The data report: what a run of preprocessing wrote, as `<kind>_report.md` and a picture beside the token files.

Counts and sizes, what was dropped and where, how long the documents are, which tokens are used, ten documents to read.
"""

import json
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np

from utils.atomic import atomic_write
from utils.log import format_count
from utils.tokenizer import Tokenizer

SAMPLES = 10
SAMPLE_TOKENS = 300  # of a longer document the beginning is shown
PLACES = 3  # files and lines named for each reason
SHARES = {0: "shortest", 50: "median", 95: "95% at most", 99: "99% at most", 100: "longest"}
DRAWING = ("matplotlib.figure", "matplotlib.backends.backend_agg")
PART = 1 << 18  # tokens looked at in one go: few enough to stay in the cache


class Split:
    """One token file with its neighbours, read a part at a time."""

    def __init__(self, folder: Path, name: str):
        self.name, self.path = name, folder / f"{name}.bin"
        self.meta = json.loads((folder / f"{name}.meta.json").read_text(encoding="utf-8"))
        self.dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        starts = np.load(folder / f"{name}.docs.npy", mmap_mode="r").astype(np.int64)
        self.bounds = np.append(starts, self.meta["tokens"])
        self.lengths = np.diff(self.bounds)
        mask = folder / f"{name}.mask.bin"
        self.with_loss = sum(int(part.sum()) for part in _parts(mask, np.dtype(np.uint8))) if mask.is_file() else None

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """(V,) how often each token occurs."""
        counts = np.zeros(vocab_size, np.int64)
        for part in _parts(self.path, self.dtype):
            counts += np.bincount(part, minlength=vocab_size)
        return counts

    def document(self, index: int, most: int) -> list[int]:
        """The first tokens of a document."""
        start, count = int(self.bounds[index]), int(min(most, self.lengths[index]))
        return np.fromfile(self.path, self.dtype, count, offset=start * self.dtype.itemsize).tolist()


def _parts(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while len(part := np.fromfile(file, dtype, PART)):
            yield part


def load_drawing() -> None:
    """Import what draws, which takes as long as the rest of a report, beside the work that comes before it."""
    threading.Thread(target=lambda: list(map(import_module, DRAWING)), daemon=True).start()


def write_report(folder: Path, kind: str, tokenizer: Tokenizer, seed: int = 1) -> Path:
    """Describe `<kind>_train` and `<kind>_val`, and return the path of the report.

    Where `<kind>_rejects.jsonl` lists {"file", "line", "reason"}, the reasons come with places to look at.
    """
    splits = [Split(folder, f"{kind}_{split}") for split in ("train", "val")]
    counts = sum(split.token_counts(tokenizer.vocab_size) for split in splits)
    picture = f"{kind}_report.png"
    with atomic_write(folder / picture) as beside:
        draw(splits, counts, beside)
    text = "\n\n".join(
        [
            f"# Data report: {kind}",
            _sizes(splits),
            f"![lengths of the documents, and how often each token occurs]({picture})",
            _tokens(counts, tokenizer),
            "## Dropped",
            _dropped(splits[0].meta, folder / f"{kind}_rejects.jsonl"),
            f"## {SAMPLES} documents drawn with seed {seed}",
            *_samples(splits[0], tokenizer, seed),
        ]
    )
    path = folder / f"{kind}_report.md"
    with atomic_write(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")
    return path


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _sizes(splits: list[Split]) -> str:
    rows = [["", *(split.name for split in splits)]]
    rows.append(["documents", *(f"{split.meta['documents']:,}" for split in splits)])
    rows.append(["tokens", *(f"{split.meta['tokens']:,}" for split in splits)])
    rows.append(["characters", *(f"{split.meta['characters']:,}" for split in splits)])
    if splits[0].with_loss is not None:
        rows.append(["tokens with loss", *(_share(split.with_loss, split.meta["tokens"]) for split in splits)])
    else:
        rate = [split.meta["characters"] / max(1, split.meta["tokens"]) for split in splits]
        rows.append(["characters a token", *(f"{value:.3f}" for value in rate)])
    rows.append(["file, MB", *(f"{split.path.stat().st_size / 1e6:,.1f}" for split in splits)])
    for share, name in SHARES.items():
        found = [np.percentile(split.lengths, share, method="lower") if len(split.lengths) else 0 for split in splits]
        rows.append([f"tokens a document, {name}", *(f"{value:,}" for value in found)])
    return _table(rows)


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(1, whole):.1%})"


def _tokens(counts: np.ndarray, tokenizer: Tokenizer) -> str:
    unused = int((counts == 0).sum())
    top = ", ".join(
        f"``{tokenizer.decode([int(i)], skip_special=False)!r}`` {counts[i] / counts.sum():.1%}"
        for i in np.argsort(-counts, kind="stable")[:10]
    )
    return f"{_share(unused, len(counts))} of the {len(counts):,} tokens never occur. The commonest: {top}."


def _dropped(meta: dict, rejects: Path) -> str:
    counts = {**meta["dropped"], **meta.get("bad", {})}  # sound but not wanted, and unusable
    if not counts:
        return "Nothing."
    places: dict[str, list[str]] = {}
    if rejects.is_file():
        with open(rejects, "rb") as file:
            for row in map(json.loads, file):
                found = places.setdefault(row["reason"], [])
                if len(found) < PLACES:
                    found.append(f"{row['file']}:{row['line']}")
    rows = [["records", "reason", "for example"]]
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        rows.append([f"{count:,}", reason, ", ".join(places.get(reason, []))])
    return _table(rows)


def _samples(split: Split, tokenizer: Tokenizer, seed: int) -> Iterator[str]:
    """Each document under its number, indented, so that nothing in it is read as Markdown."""
    count = len(split.lengths)
    for index in sorted(np.random.default_rng(seed).choice(count, min(SAMPLES, count), replace=False).tolist()):
        ids = split.document(index, SAMPLE_TOKENS)
        more = f", the first {len(ids)} of" if len(ids) < split.lengths[index] else ","
        text = tokenizer.decode(ids, skip_special=False)
        yield f"Document {index}{more} {split.lengths[index]} tokens:"
        yield "\n".join("    " + line for line in text.splitlines())


def draw(splits: list[Split], counts: np.ndarray, picture: Path) -> None:
    """Two panels: documents by length, and tokens of the vocabulary by rank."""
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
    left.set(xscale="log", yscale="log", xlabel="tokens a document", ylabel="documents")
    left.legend()
    used = np.sort(counts[counts > 0])[::-1]
    right.plot(np.arange(1, len(used) + 1), used)
    right.set(xscale="log", yscale="log", xlabel="rank of the token", ylabel="times it occurs")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        for axis in (axes.xaxis, axes.yaxis):  # matplotlib's own ticks would be half the time of a report
            axis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_major_formatter(lambda number, place: format_count(number))
            axis.set_minor_locator(NullLocator())
    figure.savefig(picture, format="png")
