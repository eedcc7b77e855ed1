"""Held-out bits per character of poems alone: title, author and text."""

import math

import torch

from utils.log import Progress


@torch.inference_mode()
def bits_per_character(model, tokenizer, documents: list[str], batch_size: int = 32) -> float:
    """Return the bits a character of `documents`, each read from its own start to its end sign.

    The sum of -log2 p over all tokens of `<s> text </s>` but the first, divided by the characters of the texts.
    Documents longer than the model takes are cut there, in both counts alike.
    """
    device = next(model.parameters()).device
    longest = model.args.max_seq_len
    nats, characters = 0.0, 0
    encoded = tokenizer.encode_batch(documents)
    order = sorted(range(len(documents)), key=lambda i: len(encoded[i]))  # rows of a batch about equally long
    progress = Progress(len(order), 0, "bits")
    for start in range(0, len(order), batch_size):
        rows = []
        for i in order[start : start + batch_size]:
            ids = [tokenizer.bos_id, *encoded[i], tokenizer.eos_id]
            characters += len(documents[i]) if len(ids) - 1 <= longest else len(tokenizer.decode(ids[: longest + 1]))
            rows.append(ids[: longest + 1])
        width = max(map(len, rows))
        tokens = torch.full((len(rows), width), tokenizer.pad_id)
        targets = torch.full((len(rows), width - 1), -100)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
            targets[row, : len(ids) - 1] = torch.tensor(ids[1:])
        _, loss, other_vars = model(tokens[:, :-1].to(device), targets=targets.to(device))
        nats += other_vars.get("loss/ce", loss).item() * (targets != -100).sum().item()
        progress.update(min(start + batch_size, len(order)))
    progress.close()
    return nats / math.log(2) / characters
