"""The tokenizer of a published checkpoint, given the special tokens that this project works with.

Every id keeps its text. A role that the tokenizer knows under another name (its own mark of a text's beginning, say) is
renamed; the marks of a chat take slots that were reserved and never trained, or new ids behind all others.
"""

import json
import re
import shutil
from pathlib import Path

from utils.errors import UserError
from utils.tokenizer import BYTE_OF, FILES, SPECIAL_TOKENS, side_files

ROLES = {"<s>": "bos", "</s>": "eos", "<pad>": "pad", "<unk>": "unk"}
RESERVED = re.compile(r"reserved|place.?holder|unused|extra_id|dummy", re.IGNORECASE)


def adopt_tokenizer(source: Path, target: Path, config: dict) -> int:
    """Write the tokenizer of the checkpoint folder `source` to `target`; returns how many ids a model needs for it.

    config: its config.json. UserError when there is no tokenizer.json, or none of byte-level tokens.
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
            raise UserError(f"{path} is no byte-level tokenizer, and only those can be read here")
        _rename(data, _choose(data, _roles(source, config)))
        (target / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    for name, text in side_files().items():
        if not (target / name).is_file():
            (target / name).write_text(text, encoding="utf-8")
    return 1 + max(*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"]))


def _roles(source: Path, config: dict) -> dict[str, object]:
    """{our token: the text or the id of theirs} for the roles that the checkpoint's files name."""
    path = source / "tokenizer_config.json"
    named = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    roles = {}
    for ours, role in ROLES.items():
        theirs = named.get(f"{role}_token", config.get(f"{role}_token_id"))
        theirs = theirs.get("content") if isinstance(theirs, dict) else theirs
        roles[ours] = theirs[0] if isinstance(theirs, list) else theirs
    return roles


def _choose(data: dict, roles: dict[str, object]) -> dict[str, int]:
    """{special token of ours that is missing: the id that it gets}."""
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    vocab = data["model"]["vocab"]
    taken = {added[token] for token in SPECIAL_TOKENS if token in added}
    free = [i for text, i in sorted(added.items(), key=lambda item: item[1]) if RESERVED.search(text)]
    end = 1 + max(*vocab.values(), *added.values(), -1)
    chosen = {}
    for token in SPECIAL_TOKENS:
        if token in added:
            continue
        theirs = roles.get(token)
        place = theirs if isinstance(theirs, int) else added.get(theirs, vocab.get(theirs, vocab.get(token)))
        if place is None or place in taken:
            place = next((i for i in free if i not in taken), None)
        if place is None:
            place, end = end, end + 1
        chosen[token] = place
        taken.add(place)
    return chosen


def _rename(data: dict, chosen: dict[str, int]) -> None:
    """Give the ids of `chosen` their new texts, as special tokens, in the parsed tokenizer.json."""
    names = {i: token for token, i in chosen.items()}
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {names.get(i, text): i for text, i in vocab.items()}
    kept = [token for token in data["added_tokens"] if token["id"] not in names]
    for token in kept:  # a mark outside the byte alphabet is no text: it must not reach the decoder
        token["special"] |= token["content"] in SPECIAL_TOKENS or (
            bool(token["content"].strip()) and not BYTE_OF.keys() >= set(token["content"])
        )
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    kept += [{"id": i, "content": text, **plain, "special": True} for i, text in names.items()]
    data["added_tokens"] = sorted(kept, key=lambda token: token["id"])
