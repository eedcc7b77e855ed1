"""Small token files of both stages."""

import json
from pathlib import Path

import numpy as np

from tests.support.make_tokenizer import make_tokenizer


def write_tokens(stem: Path, documents, tokenizer, masks=None, **meta) -> Path:
    """Write documents (lists of ids, <s> and </s> included) as stem.bin with its side files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    tokens = np.concatenate(documents).astype("<u2")
    tokens.tofile(f"{stem}.bin")
    starts = np.cumsum([0, *map(len, documents[:-1])]).astype(np.uint64)
    np.save(f"{stem}.docs.npy", starts)
    if masks is not None:
        np.concatenate(masks).astype(np.uint8).tofile(f"{stem}.mask.bin")
    about = {
        "dtype": "uint16",
        "tokens": len(tokens),
        "documents": len(documents),
        "characters": len(tokens),
        "vocab_size": tokenizer.vocab_size,
        "max_id": int(tokens.max()),
        "sha256": str(hash(tokens.tobytes())),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        **meta,
    }
    Path(f"{stem}.meta.json").write_text(json.dumps(about))
    return Path(f"{stem}.bin")


def texts(count: int, seed: int = 0) -> list[str]:
    """Short texts with something to learn: a counting pattern of random length."""
    random = np.random.default_rng(seed)
    return [
        "".join("abcdefgh"[(i + start) % 8] for i in range(length))
        for start, length in zip(random.integers(0, 8, count), random.integers(5, 40, count))
    ]


def pretrain_files(folder: Path, tokenizer, count: int = 120) -> tuple[Path, Path]:
    """pretrain_train.bin and pretrain_val.bin of short texts."""

    def documents(n, seed):
        return [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts(n, seed)]

    return (
        write_tokens(folder / "pretrain_train", documents(count, 1), tokenizer, kind="pretrain"),
        write_tokens(folder / "pretrain_val", documents(12, 2), tokenizer, kind="pretrain"),
    )


def sft_files(folder: Path, tokenizer, count: int = 60) -> tuple[Path, Path]:
    """sft_train.bin and sft_val.bin of one-turn conversations whose second half carries loss."""

    def write(name, n, seed):
        documents, masks = [], []
        for text in texts(n, seed):
            ids = [tokenizer.bos_id, tokenizer.im_start_id, *tokenizer.encode(text), tokenizer.im_end_id]
            documents.append(ids)
            masks.append([0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2))
        return write_tokens(folder / name, documents, tokenizer, masks, kind="sft")

    return write("sft_train", count, 3), write("sft_val", 10, 4)


def stage_files(folder: Path):
    """All that the training stages read: folder/tokenizer, and the files of both stages in folder/data."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    pretrain_files(folder / "data", tokenizer)
    sft_files(folder / "data", tokenizer)
