"""The tokenizer: text to ids with special tokens switched off, ids to text without partial characters."""

import codecs
import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from utils.atomic import copy_file, write_text
from utils.chat_template import CHAT_TEMPLATE
from utils.errors import UserError
from utils.files import require_content
from utils.foreign_tokenizer import (
    CHAT_TOKENS,
    ROLES,
    ForeignTokenizer,
    complete_tokenizer,
    find_ends,
    find_prefix,
    read_optional,
    token_text,
)

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", *CHAT_TOKENS)
OWN_ROLES: dict[str, str | None] = dict(zip(ROLES, SPECIAL_TOKENS))
N_SPECIAL = 16  # the other ids are reserved: a later stage can use one without changing any id
COMPLETED = "mini_llm"  # the key of tokenizer_config.json in a tokenizer of others that has been completed
BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # a byte, in a vocabulary that is not byte-level
SPACE = "\u2581"  # a space there


class Tokenizer:
    """A tokenizer folder. `</s>` in a text is encoded as ordinary tokens, never as the special one.

    `bos_id` and `eos_id` stand around a document; they may be one id. `prefix_ids` stand before a prompt and a chat.
    An answer ends at `end_ids`, and that of a model which was trained on our chats at `stop_ids`.
    """

    def __init__(
        self, path: Path, backend: Backend, completed: ForeignTokenizer | None = None, ends: list[int] | None = None
    ) -> None:
        """completed: its roles, prefix and ends; None: those of a tokenizer made here, whose ends may be others."""
        self.path = path
        self.backend = backend
        self.backend.encode_special_tokens = True  # this library's name for encoding them as ordinary text
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.roles = completed.roles if completed else OWN_ROLES
        self.prefix_ids = [self._special_id(token) for token in (completed.prefix if completed else ["<s>"])]
        self.eos_id = self._special_id(self.roles["eos"])
        self.bos_id = self._start_id()
        self.bos_is_unique = self.bos_id not in (self.eos_id, self.role_id("unk"))
        self.pad_id = self._special_id(self.roles["pad"] or self.roles["eos"])
        self.im_start_id, self.im_end_id, self.think_id, self.end_think_id = map(self._special_id, CHAT_TOKENS)
        own_ends = {self.eos_id, self.im_end_id}
        ends = completed.ends if completed else ends
        self.end_ids = own_ends if ends is None else set(ends)
        self.stop_ids = self.end_ids | own_ends
        self.is_ours = completed is None
        self._completed = completed
        text = completed.text.encode() if completed else (path / "tokenizer.json").read_bytes()
        self.fingerprint = hashlib.sha256(text).hexdigest()

    def _special_id(self, token: str | None) -> int:
        token_id = None if token is None else self.backend.token_to_id(token)
        if token_id is None:
            raise UserError(f"the tokenizer in {self.path} has no token {token}: run python train_tokenizer.py")
        return token_id

    def role_id(self, role: str) -> int | None:
        """The id of unk, bos, eos or pad; None where the tokenizer has none."""
        token = self.roles[role]
        return None if token is None else self.backend.token_to_id(token)

    def _start_id(self) -> int:
        """The id that begins a document: that of a prompt, else of the role, else the end of the document before."""
        if len(self.prefix_ids) == 1:
            return self.prefix_ids[0]
        return self._special_id(self.roles["bos"] or self.roles["eos"])

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without <s> and </s>."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model is to continue, as transformers encodes it; of no text, a document's beginning."""
        return [*self.prefix_ids, *self.encode(text)] or [self.bos_id]

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of ids; invalid UTF-8 becomes U+FFFD. skip_special omits <s>, <|im_end|>, ..."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def special_ids(self) -> set[int]:
        return {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def text_tokens(self) -> set[str]:
        """The added tokens that are text, such as four spaces or a word, and not special."""
        return {token.content for token in self.backend.get_added_tokens_decoder().values() if not token.special}

    @cached_property
    def is_byte_level(self) -> bool:
        decoder = self.backend.decoder
        return decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, which may be part of a character; of a special token, those of its name."""
        token = self.backend.id_to_token(token_id) or ""
        return token.encode() if token_id in self.special_ids else self._bytes(token)

    def _bytes(self, token: str) -> bytes:
        if not self.is_byte_level:
            byte = BYTE_FALLBACK.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
        # The decoder of the library knows no added tokens: what has a character outside its alphabet is a text.
        return bytes(map(BYTE_OF.__getitem__, token)) if BYTE_OF.keys() >= set(token) else token.encode()

    @cached_property
    def characters(self) -> np.ndarray:
        """(V,) how many characters begin in each token; the sum over the ids of a text is its length."""
        counts = np.zeros(self.vocab_size, np.int64)
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i not in self.special_ids:
                counts[i] = sum(byte >> 6 != 0b10 for byte in self._bytes(token))  # first bytes of UTF-8 characters
        return counts

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._completed:
            write_text(folder / "tokenizer.json", self._completed.text)
        elif self.path.resolve() != folder.resolve():
            copy_file(self.path / "tokenizer.json", folder / "tokenizer.json")
        for name, text in self.side_files().items():
            write_text(folder / name, text)

    def side_files(self) -> dict[str, str]:
        """{name: text} of the files next to tokenizer.json."""
        prefix = [str(self.backend.id_to_token(i)) for i in self.prefix_ids]
        files = side_files(self.roles, None if prefix == [self.roles["bos"]] else prefix, self._completed is not None)
        if self._completed or self.end_ids != {self.eos_id, self.im_end_id}:
            files["generation_config.json"] = json.dumps({"eos_token_id": sorted(self.end_ids)}) + "\n"
        return files


def side_files(
    roles: dict[str, str | None] = OWN_ROLES, prefix: list[str] | None = None, completed: bool = False
) -> dict[str, str]:
    """{name: text} of the files that transformers reads next to tokenizer.json.

    prefix: what a chat begins with; None: the beginning-of-sequence token. completed: a tokenizer of others.
    """
    beginning = "{{- bos_token }}"
    template = CHAT_TEMPLATE
    if prefix is not None:
        text = json.dumps("".join(prefix), ensure_ascii=False)  # also a string of Jinja
        template = template.replace(beginning, f"{{{{- {text} }}}}" if prefix else "", 1)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": token for role, token in roles.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
        "chat_template": template,
    }
    if completed:
        config[COMPLETED] = True
    return {
        "chat_template.jinja": template,
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def load_tokenizer(folder: str | Path, weights: dict[str, Any] | None = None) -> Tokenizer:
    """Load a tokenizer folder, ours or one that transformers loads; UserError when there is none or it is damaged.

    weights: the config.json of weights that have been trained with it, if it is to begin and end texts as there
    (`complete_tokenizer`).
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        for other in ("tokenizer.model", "vocab.json", "vocab.txt"):
            if (folder / other).is_file():
                raise UserError(
                    f"{folder} has {other} and no tokenizer.json: write that with transformers, "
                    "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
                )
        raise UserError(f"no tokenizer in {folder}: run python train_tokenizer.py, or pass --tokenizer_path")
    require_content(path)
    try:
        backend = Backend.from_file(str(path))
        backend.no_truncation()
        backend.no_padding()
    except Exception as error:  # the library raises Exception itself
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}): fetch it again, or train a tokenizer") from None
    settings = read_optional(folder / "tokenizer_config.json")
    if _is_ours(backend, settings, folder):
        has_ends = (folder / "generation_config.json").is_file()
        return Tokenizer(folder, backend, ends=find_ends(folder, {}) if has_ends else None)
    if COMPLETED in settings:
        roles = {role: token_text(settings, f"{role}_token", folder / "tokenizer_config.json") for role in ROLES}
        text = path.read_bytes().decode()
        completed = ForeignTokenizer(text, roles, find_prefix(backend), find_ends(folder, {}))
    else:
        completed = complete_tokenizer(folder, backend, settings, weights)
        backend = Backend.from_str(completed.text)
    return Tokenizer(folder, backend, completed)


def _is_ours(backend: Backend, settings: dict[str, Any], folder: Path) -> bool:
    """Whether the tokenizer has the special tokens of this project in their roles, as one that was trained here."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    path = folder / "tokenizer_config.json"
    roles = {role: token_text(settings, f"{role}_token", path) or token for role, token in OWN_ROLES.items()}
    return added.issuperset(SPECIAL_TOKENS) and roles == OWN_ROLES and COMPLETED not in settings


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

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Where the vocabulary is not byte-level, the text of a token depends on the tokens before it.
        self._window: list[int] = []
        self._read = 0  # tokens of the window whose text was returned
        self._length = 0  # characters of those

    def push(self, token_id: int) -> str:
        """The text that this token completes: no, one or several characters."""
        if token_id in self._tokenizer.special_ids:
            return ""
        if not self._tokenizer.is_byte_level:
            return self._push_window(token_id)
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def _push_window(self, token_id: int) -> str:
        self._window.append(token_id)
        token = self._tokenizer.backend.id_to_token(token_id) or ""
        text = self._tokenizer.decode(self._window)
        if BYTE_FALLBACK.fullmatch(token) or text.endswith("\ufffd"):  # bytes are decoded when all of them are there
            return ""
        piece = text[self._length :]
        if piece:
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._length = len(self._tokenizer.decode(self._window))
        return piece

    def flush(self) -> str:
        """The rest at the end: U+FFFD when the bytes end inside a character."""
        if self._window:
            return self._tokenizer.decode(self._window)[self._length :]
        return self._decoder.decode(b"", final=True)
