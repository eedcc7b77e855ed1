"""Raw text to token files.

Inside this folder, or from the root as preprocess_data/preprocess_data.py:

python preprocess_data.py                        # pretrain and sft, for the corpora that are present
python preprocess_data.py fetch poems            # an embedded corpus: poems, idioms, demo-chat
python preprocess_data.py pretrain --sources=wikipedia-cn,my.jsonl --text_field=text
python preprocess_data.py sft --sources=deepctrl-sft
"""

import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    # As a script, Python searches this folder first, where preprocess_data is this file and not the package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from preprocess_data.corpora.demo_chat import make_chat
from preprocess_data.corpora.fetching import write_jsonl
from preprocess_data.corpora.idioms import fetch_idioms
from preprocess_data.corpora.poems import fetch_poems
from preprocess_data.corpora.registry import CORPORA, CORPORA_PATH, find_sources
from preprocess_data.pipeline.counts import format_reasons
from preprocess_data.pipeline.prepare import PrepareConfig, prepare
from utils.config import check_bounds, opt, parse
from utils.errors import UserError, run_script
from utils.log import format_seconds, log

FETCHERS = {"poems": fetch_poems, "idioms": fetch_idioms}
FETCHABLE = (*FETCHERS, "demo-chat")


@dataclass
class FetchConfig:
    """Fetches an embedded corpus: poems, idioms, or demo-chat (chat examples made from the two)."""

    corpora_path: str = opt(CORPORA_PATH, "folder to write", path=True)
    rows: int = opt(60_000, "chat examples for training (demo-chat)", ge=1)

    def __post_init__(self) -> None:
        check_bounds(self)


def fetch(name: str, config: FetchConfig) -> None:
    """Fetch an embedded corpus and write it as jsonl."""
    folder = Path(config.corpora_path)
    start = time.time()
    if name == "demo-chat":
        records = make_chat(folder, config.rows)
        filtered: Counter = Counter()
    else:
        records, filtered = FETCHERS[name](folder / "downloads")
    path = folder / CORPORA[name].files
    write_jsonl(path, records)
    log(f"{name}: {len(records)} records in {config.corpora_path}/{path.name}. {format_seconds(time.time() - start)}")
    log(f"filtered: {format_reasons(filtered)}")


def main(argv: list[str] | None = None) -> None:
    argv = ["--help" if word == "-h" else word for word in (sys.argv[1:] if argv is None else argv)]
    command = _pop_word(argv)
    if command == "fetch":
        name = _pop_word(argv)
        if "--help" not in argv and name not in FETCHABLE:
            raise UserError(f"fetch {name or 'what'}? One of: {', '.join(FETCHABLE)}")
        fetch(name, parse(FetchConfig, argv))
    elif command in ("pretrain", "sft"):
        prepare(command, parse(PrepareConfig, argv))
    elif command:
        raise UserError(f"unknown command {command}: one of fetch, pretrain, sft, or none for pretrain and sft")
    else:
        if "--help" in argv:
            log(__doc__)
        config = parse(PrepareConfig, argv)
        if config.sources:
            raise UserError("--sources needs a command: preprocess_data.py pretrain --sources=..., or sft")
        prepare_available(config)


def _pop_word(argv: list[str]) -> str:
    """Remove and return the first word, or "" if it is a flag."""
    return argv.pop(0) if argv and not argv[0].startswith("--") else ""


def prepare_available(config: PrepareConfig) -> None:
    """Both kinds; a kind without any corpus is skipped as long as the other has one."""
    done = False
    for kind, is_last in (("pretrain", False), ("sft", True)):
        try:
            find_sources("", Path(config.corpora_path), chat=kind == "sft")
        except UserError as error:
            if is_last and not done:
                raise
            log(f"{kind}: skipped, {error}")
            continue
        prepare(kind, config)
        done = True


if __name__ == "__main__":
    run_script(main)
