"""The tokenizer of a checkpoint folder: read with the checkpoint, and written so that AutoTokenizer agrees with us."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from utils.atomic import write_text
from utils.errors import UserError
from utils.foreign_tokenizer import find_prefix, prefix_template
from utils.tokenizer import Tokenizer, load_tokenizer

NONE = '"post_processor": null'


def read_tokenizer(source: Path, config: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a checkpoint folder; UserError when there is none, or it is not byte-level.

    config: its config.json.
    """
    if not (source / "tokenizer.json").is_file():
        raise UserError(f"{source} has no tokenizer.json: put the one of the model there")
    tokenizer = load_tokenizer(source, config)
    if not tokenizer.is_byte_level:
        raise UserError(f"{source / 'tokenizer.json'} is not a byte-level tokenizer, and only those can be read here")
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files so that AutoTokenizer begins a text as our commands do.

    Tokenizers trained here leave that to the commands. Import takes it back, so that the fingerprint, which token files
    and runs know, does not change.
    """
    tokenizer.save(folder)
    path = folder / "tokenizer.json"
    backend = Backend.from_file(str(path))
    prefix = [str(backend.id_to_token(i)) for i in tokenizer.prefix_ids]
    if find_prefix(backend) == prefix:
        return
    text = path.read_bytes().decode()
    if NONE in text:
        write_text(path, text.replace(NONE, _beginning(tokenizer), 1))
    else:
        data = json.loads(text)
        data["post_processor"] = prefix_template(list(zip(prefix, tokenizer.prefix_ids)))
        write_text(path, json.dumps(data, ensure_ascii=False))


def restore_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files into a run folder, as they were before `write_tokenizer`."""
    tokenizer.save(folder)
    path = folder / "tokenizer.json"
    text = path.read_bytes().decode()
    if tokenizer.is_ours and _beginning(tokenizer) in text:
        write_text(path, text.replace(_beginning(tokenizer), NONE, 1))


def _beginning(tokenizer: Tokenizer) -> str:
    """The line of tokenizer.json that puts the prefix before every text."""
    tokens = [(str(tokenizer.backend.id_to_token(i)), i) for i in tokenizer.prefix_ids]
    return f'"post_processor": {json.dumps(prefix_template(tokens), ensure_ascii=False)}'
