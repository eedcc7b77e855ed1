"""run_model.py over runs whose model is planted: it answers a message with the message itself.

So a test decides what "the model" writes, while the page, the engine and the tokenizer are the real ones. What it was
asked for is a line of `asked.jsonl` in the home folder.
"""

import json
import runpy
from pathlib import Path

import torch

from engine.inference import chat
from model.basemodel import BaseModel, BaseModelArgs
from tests.support.payloads import MARKUP
from utils.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


class Parrot(BaseModel):
    """Its logits point to the next token of the last message; it reports two loads of experts, and reads no state."""

    def __init__(self, tokenizer):
        super().__init__(BaseModelArgs(tokenizer.vocab_size, 4096))
        self.tokenizer, self.anchor = tokenizer, torch.nn.Parameter(torch.zeros(1))
        self.role = len(tokenizer.encode("user\n")), len(tokenizer.encode("assistant\n"))

    def forward(self, input_ids, targets=None):
        logits = torch.zeros(*input_ids.shape, self.args.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            logits[row, :, self.next(ids)] = 20
        return logits, None, {"moe/load": torch.ones(2, 3), f"moe/load {MARKUP}": torch.ones(2, 3)}

    def next(self, ids):
        turns = [at for at, token in enumerate(ids) if token == self.tokenizer.im_start_id]
        if len(turns) < 2:
            return self.tokenizer.im_end_id
        message = ids[turns[-2] + 1 + self.role[0] : turns[-1]]
        message = message[: message.index(self.tokenizer.im_end_id)]
        written = len(ids) - (turns[-1] + 1 + self.role[1])
        return message[written] if written < len(message) else self.tokenizer.im_end_id


class Listening(chat.Speaker):
    def answer(self, messages, **settings):
        with open(Path.home() / "asked.jsonl", "a") as file:
            file.write(json.dumps([messages, settings]) + "\n")
        return super().answer(messages, **settings)


def open_parrot(path, *_):
    return Listening(
        Parrot(load_tokenizer(Path(path) / "tokenizer")).eval(), load_tokenizer(Path(path) / "tokenizer"), "sft"
    )


chat.open_speaker = open_parrot
runpy.run_path(str(ROOT / "run_model.py"))
