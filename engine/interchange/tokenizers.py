"""The tokenizer of a published checkpoint, extended by the special tokens of this project.

Every id keeps its text. A role that the tokenizer has under another name, such as its beginning-of-sequence token, is
renamed. The chat tokens take reserved ids that were never trained, or new ids after all others.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from utils.atomic import write_text
from utils.errors import UserError
from utils.tokenizer import BYTE_OF, FILES, SPECIAL_TOKENS, side_files

ROLES = {"<s>": "bos", "</s>": "eos", "<pad>": "pad", "<unk>": "unk"}
RESERVED = re.compile(r"reserved|place.?holder|unused|extra_id|dummy", re.IGNORECASE)


def adopt_tokenizer(source: Path, target: Path, config: dict[str, Any]) -> int:
    """Write the tokenizer of the checkpoint folder `source` to `target`, and return the vocabulary size it needs.

    config: its config.json. UserError when there is no tokenizer.json, or it is not byte-level.
    """
    path = source / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{source} has no tokenizer.json: put the one of the model there")
    target.mkdir(parents=True, exist_ok=True)
    data = json.loads(path.read_text(encoding="utf-8"))
    known = {token["content"] for token in data["added_tokens"]}
    if known.issuperset(SPECIAL_TOKENS):  # one of ours
        for name in FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
    else:
        if "ByteLevel" not in json.dumps(data.get("decoder")):
            raise UserError(f"{path} is not a byte-level tokenizer, and only those can be read here")
        _rename(data, _assign_ids(data, _read_roles(source, config)))
        write_text(target / "tokenizer.json", json.dumps(data, ensure_ascii=False))
    add_side_files(target)
    return 1 + max(*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"]))


def add_side_files(folder: Path) -> None:
    """Write the files that transformers reads next to tokenizer.json, those that are missing."""
    for name, text in side_files().items():
        if not (folder / name).is_file():
            write_text(folder / name, text)


def _read_roles(source: Path, config: dict[str, Any]) -> dict[str, str | int | None]:
    """Return {our token: the text or the id of theirs} for the roles that the checkpoint's files name."""
    path = source / "tokenizer_config.json"
    named = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    roles = {}
    for ours, role in ROLES.items():
        theirs = named.get(f"{role}_token", config.get(f"{role}_token_id"))
        theirs = theirs.get("content") if isinstance(theirs, dict) else theirs
        roles[ours] = theirs[0] if isinstance(theirs, list) else theirs
    return roles


def _assign_ids(data: dict[str, Any], roles: dict[str, str | int | None]) -> dict[str, int]:
    """Return {special token of ours that is missing: the id it gets}."""
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    vocab = data["model"]["vocab"]
    taken = {added[token] for token in SPECIAL_TOKENS if token in added}
    reserved = [i for text, i in sorted(added.items(), key=lambda item: item[1]) if RESERVED.search(text)]
    next_id = 1 + max(*vocab.values(), *added.values(), -1)
    assigned = {}
    for token in SPECIAL_TOKENS:
        if token in added:
            continue
        theirs = roles.get(token)
        id_ = theirs if isinstance(theirs, int) else added.get(theirs, vocab.get(theirs, vocab.get(token)))
        if id_ is None or id_ in taken:
            id_ = next((i for i in reserved if i not in taken), None)
        if id_ is None:
            id_ = next_id
            next_id += 1
        assigned[token] = id_
        taken.add(id_)
    return assigned


def _rename(data: dict[str, Any], assigned: dict[str, int]) -> None:
    """Give the `assigned` ids our texts, as special tokens, in the parsed tokenizer.json."""
    names = {i: token for token, i in assigned.items()}
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {names.get(i, text): i for text, i in vocab.items()}
    kept = [token for token in data["added_tokens"] if token["id"] not in names]
    for token in kept:  # a token with characters outside the byte alphabet must not reach the byte-level decoder
        token["special"] |= token["content"] in SPECIAL_TOKENS or (
            bool(token["content"].strip()) and not BYTE_OF.keys() >= set(token["content"])
        )
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    kept += [{"id": i, "content": text, **plain, "special": True} for i, text in names.items()]
    data["added_tokens"] = sorted(kept, key=lambda token: token["id"])
