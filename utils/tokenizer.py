"""The tokenizer: text to ids with special tokens switched off, ids to text without partial characters."""

import codecs
import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend

from utils.atomic import copy_file
from utils.chat_template import CHAT_TEMPLATE
from utils.errors import UserError

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
N_SPECIAL = 16  # the other ids are reserved: a later stage can use one without changing any id
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Tokenizer:
    """A trained tokenizer folder. `</s>` in a text is encoded as ordinary tokens, never as the special one."""

    def __init__(self, path: Path, backend: Backend):
        self.path = path
        self.backend = backend
        self.backend.encode_special_tokens = True  # this library's name for encoding them as ordinary text
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.fingerprint = hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest()
        self.unk_id = self._special_id("<unk>")
        self.bos_id = self._special_id("<s>")
        self.eos_id = self._special_id("</s>")
        self.pad_id = self._special_id("<pad>")
        self.im_start_id = self._special_id("<|im_start|>")
        self.im_end_id = self._special_id("<|im_end|>")
        self.think_id = self._special_id("<think>")
        self.end_think_id = self._special_id("</think>")

    def _special_id(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise UserError(f"the tokenizer in {self.path} has no token {token}: run python train_tokenizer.py")
        return token_id

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without <s> and </s>."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of ids; invalid UTF-8 becomes U+FFFD. skip_special omits <s>, <|im_end|>, ..."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def special_ids(self) -> set[int]:
        return {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, which may be part of a character; of a special token, those of its name."""
        token = self.backend.id_to_token(token_id) or ""
        return token.encode() if token_id in self.special_ids else bytes(map(BYTE_OF.__getitem__, token))

    @cached_property
    def characters(self) -> np.ndarray:
        """(V,) how many characters begin in each token; the sum over the ids of a text is its length."""
        vocab = self.backend.get_vocab(with_added_tokens=True)
        counts = np.zeros(1 + max(vocab.values()), np.int64)
        for token, i in vocab.items():
            if i not in self.special_ids:
                counts[i] = sum(BYTE_OF.get(char, 0) >> 6 != 0b10 for char in token)  # first bytes of UTF-8 characters
        return counts

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            source = self.path / name
            if source.exists() and source.resolve() != (folder / name).resolve():
                copy_file(source, folder / name)


def side_files() -> dict[str, str]:
    """{name: text} of the files that transformers reads next to tokenizer.json."""
    unk, bos, eos, pad, *_ = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "chat_template.jinja": CHAT_TEMPLATE,
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load a tokenizer folder; UserError when there is none or it cannot be read."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"no tokenizer in {folder}: run python train_tokenizer.py, or pass --tokenizer_path")
    try:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{folder / 'tokenizer.json'} cannot be read ({error}): train the tokenizer again") from None
    return Tokenizer(folder, backend)


def _byte_alphabet() -> dict[str, int]:
    """{character of the byte-level vocabulary: byte} (the table of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


class StreamDecoder:
    """Incremental decoding: what `push` returns is final and never a partial character.

    The concatenated outputs, with `flush` at the end, equal `tokenizer.decode(ids)`.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes: no, one or several characters."""
        if token_id in self._tokenizer.special_ids:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The rest at the end: U+FFFD when the bytes end inside a character."""
        return self._decoder.decode(b"", final=True)
