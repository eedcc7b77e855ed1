"""A tiny tokenizer, tiny data and a tiny model, for tests of the engine."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import nn

from model.basemodel import BaseModel, BaseModelArgs
from utils.tokenizer import N_SPECIAL, SPECIAL_TOKENS, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def make_tokenizer(folder: Path):
    """A byte-level tokenizer without merges: 16 special tokens and 256 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*SPECIAL_TOKENS, *(f"<|reserved_{i}|>" for i in range(N_SPECIAL - len(SPECIAL_TOKENS)))]
    vocab = {token: i for i, token in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(names)
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def write_tokens(stem: Path, documents, tokenizer, masks=None, **meta) -> Path:
    """Write documents (lists of ids, <s> and </s> included) as stem.bin with its neighbours."""
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


@dataclass
class TinyModelArgs(BaseModelArgs):
    dim: int = 16
    tied: bool = False
    dropout: float = 0.0


class TinyModel(BaseModel):
    """An embedding, a causal mean over the document, two mixing layers; a buffer that after_step moves; a statistic."""

    model_name = "tiny"

    def __init__(self, args):
        super().__init__(args)
        self.tok_embed = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList([nn.Linear(args.dim, args.dim) for _ in range(2)])
        self.lm_head = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tied:
            self.lm_head.weight = self.tok_embed.weight
        self.unused = nn.Parameter(torch.ones(3))  # a plugin may leave a parameter out of its graph
        self.register_buffer("bias", torch.zeros(4))
        self.init_weights()

    def forward(self, input_ids, targets=None, doc_ids=None):
        x = self.tok_embed(input_ids)  # (B, T, D)
        mask = torch.ones(x.shape[1], x.shape[1], device=x.device).tril().expand(x.shape[0], -1, -1)
        if doc_ids is not None:
            mask = mask * (doc_ids[:, :, None] == doc_ids[:, None, :])
        x = x + (mask / mask.sum(-1, keepdim=True)) @ x
        for layer in self.layers:
            x = x + nn.functional.dropout(torch.tanh(layer(x)), self.args.dropout, self.training)
        logits = self.lm_head(x)
        if targets is None:
            return logits, None, {}
        valid = (targets != -100).sum().clamp(min=1)
        ce = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum") / valid
        extra = 0.01 * x.float().square().mean()
        load = x.detach().float().mean((0, 1))[:4]
        return None, ce + extra, {"loss/ce": ce, "loss/extra": extra, "moe/load": load.expand(2, 4)}

    after_step_keeps_to_buffers = True

    def after_step(self, other_vars):
        self.bias += 0.01 * torch.sign(other_vars["moe/load"].mean(0))
