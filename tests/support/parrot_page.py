"""run_model.py over runs whose model is replaced by one that repeats the message.

So a test decides what the model generates, while the page, the engine and the tokenizer are the real ones. Each call of
`ChatModel.generate` is a line of `calls.jsonl` in the home folder.
"""

import json
import runpy
from pathlib import Path

import torch

from engine.inference import chat
from engine.runs.registry import LoadedRun
from model.basemodel import BaseModel, BaseModelArgs
from tests.support.payloads import MARKUP
from utils.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


class Parrot(BaseModel):
    """Its logits point to the next token of the last message; it reports two expert loads and takes no state."""

    def __init__(self, tokenizer):
        super().__init__(BaseModelArgs(tokenizer.vocab_size, 4096))
        self.tokenizer = tokenizer
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.role = len(tokenizer.encode("user\n")), len(tokenizer.encode("assistant\n"))

    def forward(self, input_ids, targets=None):
        logits = torch.zeros(*input_ids.shape, self.args.vocab_size)
        for index, ids in enumerate(input_ids.tolist()):
            logits[index, :, self.next(ids)] = 20
        return logits, None, {"moe/load": torch.ones(2, 3), f"moe/load {MARKUP}": torch.ones(2, 3)}

    def next(self, ids):
        turns = [at for at, token in enumerate(ids) if token == self.tokenizer.im_start_id]
        if len(turns) < 2:
            return self.tokenizer.im_end_id
        message = ids[turns[-2] + 1 + self.role[0] : turns[-1]]
        message = message[: message.index(self.tokenizer.im_end_id)]
        written = len(ids) - (turns[-1] + 1 + self.role[1])
        return message[written] if written < len(message) else self.tokenizer.im_end_id


class RecordingChatModel(chat.ChatModel):
    def generate(self, messages, **settings):
        with open(Path.home() / "calls.jsonl", "a") as file:
            file.write(json.dumps([messages, settings]) + "\n")
        return super().generate(messages, **settings)


def open_parrot(path, *_, **__):
    path = Path(path)
    tokenizer = load_tokenizer(path / "tokenizer")
    return RecordingChatModel(
        LoadedRun(Parrot(tokenizer).eval(), tokenizer, {"stage": "sft"}, path, path / "final", "")
    )


chat.open_chat_model = open_parrot
runpy.run_path(str(ROOT / "run_model.py"))
