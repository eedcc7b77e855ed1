"""Trains the tokenizer: byte-level BPE over a stream of documents, saved as a folder that transformers loads as it is.

python train_tokenizer.py                                    # all corpora in output/corpora, 32,000 tokens
python train_tokenizer.py --sources=my.jsonl --vocab_size=8192
"""

import itertools
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import gigabpe
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from preprocess_data.corpora.registry import CORPORA_PATH, Source, find_sources
from preprocess_data.pipeline.encode import document
from preprocess_data.pipeline.resume import State, reasons
from preprocess_data.pipeline.tokenizer_report import known_tokenizers, of_folder, round_trip, write_report
from preprocess_data.readers.files import InvalidRecord
from utils.atomic import atomic_write
from utils.config import opt, parse
from utils.errors import UserError, run_script
from utils.log import log
from utils.text import is_held_out
from utils.tokenizer import N_SPECIAL, SPECIAL_TOKENS, Tokenizer, load_tokenizer, side_files

# The pre-tokenizer that the file keeps: DeepSeek-V3's, to the letter, for fast encoders know it by its words. Runs of
# Chinese characters and kana stand apart from punctuation and from Latin letters.
_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
# Finer in training only, where it is enough: pairs that are never seen together are never merged. Digits stand singly:
# small models count better so.
_DIGIT = r"\p{N}"
_HAN = r"[\p{Han}\p{Hiragana}\p{Katakana}]"


@dataclass
class TokenizerConfig:
    """Trains a byte-level BPE tokenizer."""

    sources: str = opt("", "corpora, files, folders or globs, separated by commas; empty: all in the corpora folder")
    text_field: str = opt("text", "field with the text, in your own jsonl or json files")
    corpora_path: str = opt(CORPORA_PATH, "folder with the named corpora", path=True)
    tokenizer_path: str = opt("output/tokenizer", "folder to write", path=True)
    vocab_size: int = opt(32_000, "tokens, the special ones included")
    min_frequency: int = opt(2, "a merge must occur this often")
    max_characters: int = opt(10_000_000, "read no more, from all sources in turn; 0.2 GB of memory a million at most")
    max_bad_ratio: float = opt(0.001, "stop when a larger share of the records read is bad; 1 never stops")
    split_han: bool = opt(False, "every Chinese character a token of its own, as verse wants it: lines can be counted")

    def __post_init__(self):
        if self.vocab_size > 1 << 24:
            raise UserError(f"--vocab_size={self.vocab_size}: must be at most {1 << 24}")
        if not 1 <= self.min_frequency < 1 << 32:
            raise UserError(f"--min_frequency={self.min_frequency}: must be at least 1")
        if self.max_characters < 1:
            raise UserError(f"--max_characters={self.max_characters}: must be at least 1")
        if not 0 <= self.max_bad_ratio <= 1:
            raise UserError(f"--max_bad_ratio={self.max_bad_ratio}: must be between 0 and 1")


def pre_tokenizer(*finer: str) -> pre_tokenizers.PreTokenizer:
    """Split at the matches of each regular expression (Oniguruma) in turn, then to bytes: merges never cross a cut."""
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in (*finer, *_SPLITS)]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train(texts: Iterator[str], vocab_size: int, min_frequency: int = 2, split_han: bool = False) -> Backend:
    """Train on a stream of texts. The same texts give the same tokenizer."""
    if vocab_size < N_SPECIAL + 256:
        raise UserError(
            f"vocab_size={vocab_size} is too small: {N_SPECIAL} special tokens and 256 bytes need {N_SPECIAL + 256}"
        )
    special = [*SPECIAL_TOKENS, *(f"<|reserved_{i}|>" for i in range(N_SPECIAL - len(SPECIAL_TOKENS)))]
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        words = Path(folder) / "words.txt"
        try:
            write_words(texts, pre_tokenizer(_DIGIT, *([_HAN] if split_han else [])), words)
        except OSError as error:
            if error.filename:  # a source that cannot be read
                raise
            raise UserError(f"{folder}: {error.strerror}: make room, or name another folder in TMPDIR") from None
        options = {"special_tokens": special, "min_frequency": min_frequency, "pretokenizer": "whitespace"}
        vocab, merges = interruptible(lambda: gigabpe.train_bpe([str(words)], vocab_size, **options))
    backend = Backend(models.BPE(vocab, merges))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizer()
    return backend


def interruptible(work: Callable[[], object]) -> object:
    """work() in a thread that ends with the process: a library that counts for minutes would keep Ctrl-C waiting."""
    future = Future()

    def run():
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


def write_words(texts: Iterator[str], split: pre_tokenizers.PreTokenizer, path: Path) -> None:
    """The words of the texts with spaces between: what the trainer counts. It makes the same merges as the trainer of
    `tokenizers` in a quarter of its memory, which goes by the letters of different words: of Chinese nearly all.
    """
    with open(path, "w", encoding="utf-8") as file:
        # All bytes, in the order of the ids, whatever the texts hold; single ones make no pair. Spelled as the byte
        # level does it, a word holds no space.
        print(*sorted(pre_tokenizers.ByteLevel.alphabet()), file=file)
        for text in texts:
            print(*(word for word, _ in split.pre_tokenize_str(text)), file=file)


def save(backend: Backend, folder: Path) -> Tokenizer:
    """Write the folder: each file beside its name, then renamed; tokenizer.json last, as it makes the folder valid."""
    files = {**side_files(), "tokenizer.json": backend.to_str(pretty=True)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with atomic_write(folder / name) as beside:
            beside.write_text(text, encoding="utf-8")
    return load_tokenizer(folder)


def stream(sources: list[Source]) -> Iterator[tuple[str, str | InvalidRecord]]:
    """(name of the source, its next document or why it is bad), one from each source in turn.

    In turn, so that --max_characters cuts every source and not only the last.
    """
    open_ones = deque((source.name, source.texts()) for source in sources)
    while open_ones:
        name, texts = open_ones.popleft()
        if (text := next(texts, None)) is not None:
            open_ones.append((name, texts))
            yield name, document(text)


def training_texts(
    sources: list[Source], characters: int, max_bad_ratio: float = 1, state: State | None = None
) -> Iterator[str]:
    """The documents that are not held out, until so many characters have passed.

    All records read are counted in `state`; UserError when too large a share is bad.
    """
    state = state or State("")
    for name, text in stream(sources):
        state.taken[name] = state.taken.get(name, 0) + 1
        if isinstance(text, InvalidRecord):
            state.bad[text.reason] = state.bad.get(text.reason, 0) + 1
            if state.too_bad(max_bad_ratio, at_end=False):
                break
        elif not is_held_out(text):
            characters -= len(text)
            if characters < 0:
                break
            yield text
    if state.too_bad(max_bad_ratio, at_end=True):
        raise UserError(
            f"{state.bad_share(max_bad_ratio)}: mend the input, or raise --max_bad_ratio "
            "(preprocess_data.py lists each with its place)"
        )


def held_out_texts(sources: list[Source]) -> Iterator[str]:
    return (text for _, text in stream(sources) if isinstance(text, str) and is_held_out(text))


def main(argv: list[str] | None = None) -> None:
    config = parse(TokenizerConfig, argv)
    sources = find_sources(config.sources, Path(config.corpora_path), config.text_field)
    log(f"training a tokenizer of {config.vocab_size} tokens on {', '.join(source.name for source in sources)}")
    state = State("")
    texts = training_texts(sources, config.max_characters, config.max_bad_ratio, state)
    first = next(texts, None)
    if first is None:
        raise UserError(f"no text in {', '.join(source.name for source in sources)}: nothing to train a tokenizer on")
    texts = itertools.chain([first], texts)
    backend = train(texts, config.vocab_size, config.min_frequency, config.split_han)
    if state.bad:
        log(f"left out {sum(state.bad.values())} bad of {sum(state.taken.values())} records: {reasons(state.bad)}")
    tokenizer = save(backend, Path(config.tokenizer_path))
    if tokenizer.vocab_size < config.vocab_size:
        log(
            f"the text gave {tokenizer.vocab_size} tokens, fewer than asked: it has no more pairs that occur "
            f"{config.min_frequency} times"
        )
    held_out = list(itertools.islice(held_out_texts(sources), 5000))
    if held_out:
        round_trip(tokenizer, held_out)
        figures = write_report(
            [of_folder("this one", tokenizer), *known_tokenizers()],
            held_out,
            Path(config.tokenizer_path) / "report.md",
            f"{', '.join(source.name for source in sources)}: the first {len(held_out)} held-out documents",
        )
        log(f"held out, {len(held_out)} documents, round trip exact:\n{figures}")
    else:
        log("no held-out documents to report on")
    log(f"wrote {config.tokenizer_path}, {tokenizer.vocab_size} tokens")
    log("next: python preprocess_data/preprocess_data.py")


if __name__ == "__main__":
    run_script(main)
