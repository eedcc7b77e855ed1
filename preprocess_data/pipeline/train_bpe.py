"""Byte-level BPE training on a stream of documents, and the tokenizer folder that transformers loads as it is."""

import re
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import gigabpe
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from preprocess_data.corpora.registry import Source
from preprocess_data.pipeline.counts import RecordCounts
from preprocess_data.pipeline.encode import clean_document
from preprocess_data.readers.records import InvalidRecord
from utils.atomic import write_text
from utils.errors import UserError
from utils.text import is_held_out
from utils.tokenizer import N_SPECIAL, SPECIAL_TOKENS, Tokenizer, load_tokenizer, side_files

Result = TypeVar("Result")

# The pre-tokenizer in the file: that of DeepSeek-V3, character for character, because fast encoders recognize it by its
# patterns. Runs of Chinese characters and kana are separate from punctuation and from Latin letters.
_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
# Additional splits in training only, which is enough: pairs that are never seen together are never merged. Single
# digits: small models count better with them.
DIGIT = r"\p{N}"
HAN = r"[\p{Han}\p{Hiragana}\p{Katakana}]"

# A long text is split in pieces: the pre-tokenizer needs 260 bytes of memory per character of a text. Between two of
# them is one of these places, where a word ends in any case: behind a digit, a line end or a letter, before what begins
# another word.
PIECE_CHARACTERS = 10_000
_WORD_ENDS = re.compile(
    r"(?<=[0-9])|(?<=\n)(?=[A-Za-z0-9一-龥])|(?<=[A-Za-z一-龥])(?=[ \n，。、；：？！“”（）《》])", re.ASCII
)
# Longer words are split: the time of training grows with the square of their length. Text without punctuation and
# spaces is one word, as is a line of one repeated character. Other text has no such words, so nothing changes.
WORD_BYTES = 3000


def pre_tokenizer(*extra_splits: str) -> pre_tokenizers.PreTokenizer:
    """Split at the matches of each regular expression (Oniguruma) in turn, then to bytes; no merge crosses a split."""
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in (*extra_splits, *_SPLITS)]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def training_pre_tokenizer(split_han: bool) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of training: single digits and, with split_han, single Chinese characters."""
    return pre_tokenizer(DIGIT, *([HAN] if split_han else []))


def special_tokens() -> list[str]:
    """The special tokens and the reserved slots, in the order of their ids."""
    return [*SPECIAL_TOKENS, *(f"<|reserved_{i}|>" for i in range(N_SPECIAL - len(SPECIAL_TOKENS)))]


def train(texts: Iterator[str], vocab_size: int, min_frequency: int = 2, split_han: bool = False) -> Backend:
    """Train on a stream of texts; deterministic."""
    if vocab_size < N_SPECIAL + 256:
        raise UserError(
            f"vocab_size={vocab_size} is too small: {N_SPECIAL} special tokens and 256 bytes need {N_SPECIAL + 256}"
        )
    special = special_tokens()
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        words = Path(folder) / "words.txt"
        try:
            write_words(texts, training_pre_tokenizer(split_han), words)
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


def interruptible(work: Callable[[], Result]) -> Result:
    """work() in a daemon thread: a library call of several minutes would otherwise block Ctrl-C."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


def write_words(texts: Iterator[str], split: pre_tokenizers.PreTokenizer, path: Path) -> None:
    """Write the pre-tokenized words of the texts, separated by spaces, which the trainer counts.

    gigabpe makes the same merges as the trainer of `tokenizers` in a quarter of its memory.
    """
    with open(path, "w", encoding="utf-8") as file:
        # All bytes, in the order of the ids, whatever the texts contain; single ones form no pair. In the byte-level
        # alphabet a word contains no space.
        print(*sorted(pre_tokenizers.ByteLevel.alphabet()), file=file)
        for text in texts:
            for piece in split_text(text):
                words = (word for word, _ in split.pre_tokenize_str(piece))
                print(
                    *(word[at : at + WORD_BYTES] for word in words for at in range(0, len(word), WORD_BYTES)), file=file
                )


def split_text(text: str) -> Iterator[str]:
    """Yield the pieces of a long text, between words where there are any."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        for match in _WORD_ENDS.finditer(text, start + PIECE_CHARACTERS // 2, end):
            end = match.start()
        yield text[start:end]
        start = end
    yield text[start:]


def save(backend: Backend, folder: Path) -> Tokenizer:
    """Write the folder, each file atomically, tokenizer.json last: it makes the folder valid."""
    files = {**side_files(), "tokenizer.json": backend.to_str(pretty=True)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text(folder / name, text)
    return load_tokenizer(folder)


def iterate_documents(sources: list[Source]) -> Iterator[tuple[str, str | InvalidRecord]]:
    """(name of the source, its next document or why it is invalid), one from each source in turn.

    In turn, so that --max_characters limits every source and not only the last.
    """
    streams = deque((source.name, source.texts()) for source in sources)
    while streams:
        name, texts = streams.popleft()
        if (text := next(texts, None)) is not None:
            streams.append((name, texts))
            yield name, clean_document(text)


def training_texts(
    sources: list[Source], max_characters: int, max_bad_ratio: float = 1, counts: RecordCounts | None = None
) -> Iterator[str]:
    """The documents that are not held out, up to `max_characters`.

    All records that are read are added to `counts`; UserError when too many are invalid.
    """
    counts = counts or RecordCounts()
    remaining = max_characters
    for name, text in iterate_documents(sources):
        counts.consumed[name] = counts.consumed.get(name, 0) + 1
        if isinstance(text, InvalidRecord):
            counts.invalid[text.reason] = counts.invalid.get(text.reason, 0) + 1
            if counts.too_many_invalid(max_bad_ratio, at_end=False):
                break
        elif not is_held_out(text):
            remaining -= len(text)
            if remaining < 0:
                break
            yield text
    if counts.too_many_invalid(max_bad_ratio, at_end=True):
        raise UserError(
            f"{counts.describe_invalid(max_bad_ratio)}: correct the input, or raise --max_bad_ratio "
            "(preprocess_data.py lists each with its file and line)"
        )


def held_out_texts(sources: list[Source]) -> Iterator[str]:
    return (text for _, text in iterate_documents(sources) if isinstance(text, str) and is_held_out(text))
