"""Tokenizers of other projects: a folder as transformers reads it, completed by the tokens of our chat template.

No id changes its text, and no role gets a new id: one token may begin, end and pad a text. The chat tokens that are
missing take reserved ids, which were never trained, or new ids after all others.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from utils.errors import UserError
from utils.files import load_json

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
ROLES = ("unk", "bos", "eos", "pad")
END = "</s>"  # for a tokenizer without an end
RESERVED = re.compile(r"[<\[].*(reserved|place.?holder|unused|extra_id|dummy).*\d.*[>\]]", re.IGNORECASE)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
FETCH = "fetch the file again, or save the tokenizer with transformers once more"


@dataclass(frozen=True)
class ForeignTokenizer:
    """A tokenizer of others, completed. prefix: the tokens before a prompt. ends: ids that end an answer."""

    text: str  # tokenizer.json
    roles: dict[str, str | None]
    prefix: list[str]
    ends: list[int]


def complete_tokenizer(
    folder: Path, backend: Backend, settings: dict[str, Any], weights: dict[str, Any] | None
) -> ForeignTokenizer:
    """Complete the tokenizer of a folder whose tokenizer_config.json holds `settings`.

    weights: the config.json of weights that have been trained with it; a prompt begins and an answer ends as in
    transformers. None: weights will be trained with it here; a prompt begins as the documents do, with the token that
    begins them, or the one that ends them where it has none. UserError for a damaged file.
    """
    settings = _add_declared_tokens(folder, backend, dict(settings))
    config = read_optional(folder / "config.json") if weights is None else weights
    roles = _find_roles(folder, backend, settings, config)
    ends = find_ends(folder, config)
    end = roles["eos"] or next(filter(None, map(backend.id_to_token, ends)), END)
    roles["eos"] = end
    _make_special(backend, end)
    if weights is None:
        ends = sorted({_id_of(backend, end), *ends})
    prefix = find_prefix(backend)
    replace = weights is None and (len(prefix) != 1 or has_suffix(backend))
    if replace:
        prefix = [roles["bos"] or end]
    kept = set(filter(None, (*roles.values(), *map(backend.id_to_token, ends), *prefix)))
    slots = _add_chat_tokens(backend, kept)
    data = json.loads(backend.to_str())
    _rename(data, slots)
    if replace:
        data["post_processor"] = prefix_template([(text, _id_of(backend, text)) for text in prefix])
    return ForeignTokenizer(json.dumps(data, ensure_ascii=False), roles, prefix, ends)


def find_prefix(backend: Backend) -> list[str]:
    """Return the special tokens that stand before an encoded text."""
    encoding = backend.encode("a")
    mask = encoding.special_tokens_mask
    return encoding.tokens[: mask.index(0)] if 0 in mask else []


def has_suffix(backend: Backend) -> bool:
    """Return whether a special token is put after an encoded text."""
    return backend.encode("a").special_tokens_mask[-1:] == [1]


def prefix_template(prefix: list[tuple[str, int]]) -> dict[str, Any]:
    """Return the post-processor of a tokenizer.json that puts (token, id) pairs before every text."""

    def with_text(letter: str, kind: int) -> list[dict[str, Any]]:
        pieces = [{"SpecialToken": {"id": token, "type_id": kind}} for token, _ in prefix]
        return [*pieces, {"Sequence": {"id": letter, "type_id": kind}}]

    return {
        "type": "TemplateProcessing",
        "single": with_text("A", 0),
        "pair": with_text("A", 0) + with_text("B", 1),
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in prefix},
    }


def find_ends(folder: Path, config: dict[str, Any]) -> list[int]:
    """Return the ids at which transformers ends an answer: those of generation_config.json, else of config.json."""
    path = folder / "generation_config.json"
    if path.is_file():
        return _ids(read_optional(path), "eos_token_id", path)
    return _ids(config, "eos_token_id", folder / "config.json")


def read_optional(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} where there is no file; UserError when it is damaged."""
    return load_json(path, FETCH) if path.is_file() else {}


def token_text(settings: dict[str, Any], key: str, path: Path) -> str | None:
    """Return the token that tokenizer_config.json names, as a text or as an object with its `content`."""
    value = settings.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise UserError(f"{path} has {key}={value!r}, and it must be the text of a token: {FETCH}")
    return value or None


def _ids(settings: dict[str, Any], key: str, path: Path) -> list[int]:
    """The ids of a key that holds one, a list of them, or nothing; those below 0 mean nothing."""
    value = settings.get(key)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    if not all(type(item) is int for item in values):
        raise UserError(f"{path} has {key}={value!r}, and it must be an id or a list of ids: correct it")
    return [item for item in values if item >= 0]


def _add_declared_tokens(folder: Path, backend: Backend, settings: dict[str, Any]) -> dict[str, Any]:
    """Add the tokens that the files next to tokenizer.json declare; returns the settings of all these files.

    In the order of transformers, so that each gets the same id.
    """
    path = folder / "tokenizer_config.json"
    declared = settings.get("added_tokens_decoder")
    tokens: list[AddedToken] = []
    if declared is None:
        settings |= read_optional(folder / "special_tokens_map.json")
        added = read_optional(folder / "added_tokens.json")
        special = set(_special_texts(settings, path))
        tokens = [
            AddedToken(text, normalized=text not in special, special=text in special)
            for text in sorted(added, key=lambda text: _ids(added, text, folder / "added_tokens.json"))
        ]
    elif isinstance(declared, dict) and all(i.isdecimal() for i in declared):
        tokens = [_added_token(declared[i], path) for i in sorted(declared, key=int)]
    else:
        raise UserError(f"{path} has added_tokens_decoder of another form than {{id: token}}: {FETCH}")
    known = list(backend.get_added_tokens_decoder().values())
    tokens = [token for token in tokens if repr(token) not in set(map(repr, known))]
    texts = {token.content for token in [*known, *tokens]}
    tokens += [_special(text) for text in _special_texts(settings, path) if text not in texts]
    backend.add_tokens(tokens)
    return settings


def _special_texts(settings: dict[str, Any], path: Path) -> list[str]:
    """The tokens that tokenizer_config.json calls special, each once."""
    named = [key for key, value in settings.items() if key.endswith("_token") and isinstance(value, (str, dict))]
    texts = [token_text(settings, key, path) for key in named]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    if not isinstance(extra, list):
        raise UserError(f"{path} has extra_special_tokens={extra!r}, and it must be a list of tokens: {FETCH}")
    texts += [_added_token(token, path).content for token in extra]
    return list(dict.fromkeys(text for text in texts if text))


def _added_token(value: Any, path: Path) -> AddedToken:
    """A token as the side files write it: its text, or an object with its flags."""
    if isinstance(value, str):
        return _special(value)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise UserError(f"{path} holds the token {value!r}, and it must be a text or an object with content: {FETCH}")
    return AddedToken(value["content"], **{flag: bool(value[flag]) for flag in FLAGS if flag in value})


def _special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def _find_roles(
    folder: Path, backend: Backend, settings: dict[str, Any], config: dict[str, Any]
) -> dict[str, str | None]:
    """{role: its token, or None}; each becomes special, so that no text of a user is encoded as one."""
    roles: dict[str, str | None] = {}
    for role in ROLES:
        key = f"{role}_token"
        text = token_text(settings, key, folder / "tokenizer_config.json")
        if key not in settings:
            ids = _ids(config, f"{key}_id", folder / "config.json")
            text = backend.id_to_token(ids[0]) if ids else None
        roles[role] = text
    for text in filter(None, roles.values()):
        _make_special(backend, text)
    return roles


def _id_of(backend: Backend, text: str) -> int:
    token_id = backend.token_to_id(text)
    assert token_id is not None
    return token_id


def _make_special(backend: Backend, text: str) -> None:
    if text not in {token.content for token in backend.get_added_tokens_decoder().values() if token.special}:
        backend.add_special_tokens([_special(text)])


def _add_chat_tokens(backend: Backend, kept: set[str]) -> dict[str, str]:
    """Add the chat tokens that are missing and no reserved token can become; returns {reserved token: chat token}."""
    added = backend.get_added_tokens_decoder()
    reserved = [
        token.content
        for _, token in sorted(added.items())
        if token.special and token.content not in kept and RESERVED.fullmatch(token.content)
    ]
    missing = [token for token in CHAT_TOKENS if backend.token_to_id(token) is None]
    slots = dict(zip(reserved, missing))
    special = {token.content for token in added.values() if token.special}
    markers = [token for token in CHAT_TOKENS[:2] if token not in special]  # no text may become one of these
    backend.add_special_tokens(
        [_special(token) for token in CHAT_TOKENS if token in {*missing, *markers} - set(slots.values())]
    )
    return slots


def _rename(data: dict[str, Any], slots: dict[str, str]) -> None:
    """Give reserved tokens the texts of chat tokens, in the parsed tokenizer.json."""
    vocab = data["model"].get("vocab")
    if isinstance(vocab, dict):
        data["model"]["vocab"] = {slots.get(text, text): i for text, i in vocab.items()}
    elif isinstance(vocab, list):
        data["model"]["vocab"] = [[slots.get(text, text), score] for text, score in vocab]
    for token in data["added_tokens"]:
        if token["content"] in slots:
            plain = dict.fromkeys(FLAGS, False)
            token |= {**plain, "content": slots[token["content"]], "special": True}
