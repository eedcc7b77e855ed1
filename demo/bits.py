"""Held-out bits per character of documents: the poems alone, with title and author."""

import math

import torch

from model.basemodel import BaseModel
from utils.log import Progress
from utils.tokenizer import Tokenizer


@torch.inference_mode()
def bits_per_character(model: BaseModel, tokenizer: Tokenizer, documents: list[str], batch_size: int = 32) -> float:
    """Return the bits per character of `documents`, each a sequence of its own.

    The sum of -log2 p over all tokens of `<s> text </s>` but the first, divided by the characters of the texts.
    Documents longer than the model's max_seq_len are cut there, for both counts.
    """
    device = next(model.parameters()).device
    longest = model.args.max_seq_len
    nats = 0.0
    characters = 0
    encoded = tokenizer.encode_batch(documents)
    order = sorted(range(len(documents)), key=lambda i: len(encoded[i]))  # batches of similar lengths
    progress = Progress(len(order), 0, "bits")
    for start in range(0, len(order), batch_size):
        sequences = []
        for i in order[start : start + batch_size]:
            ids = [tokenizer.bos_id, *encoded[i], tokenizer.eos_id]
            characters += len(documents[i]) if len(ids) - 1 <= longest else len(tokenizer.decode(ids[: longest + 1]))
            sequences.append(ids[: longest + 1])
        width = max(map(len, sequences))
        tokens = torch.full((len(sequences), width), tokenizer.pad_id)  # (B, T + 1)
        targets = torch.full((len(sequences), width - 1), -100)  # (B, T)
        for i, ids in enumerate(sequences):
            tokens[i, : len(ids)] = torch.tensor(ids)
            targets[i, : len(ids) - 1] = torch.tensor(ids[1:])
        _, loss, other_vars = model(tokens[:, :-1].to(device), targets=targets.to(device))
        nats += other_vars.get("loss/ce", loss).item() * (targets != -100).sum().item()
        progress.update(min(start + batch_size, len(order)))
    progress.close()
    return nats / math.log(2) / characters
