"""Fixtures of several test files."""

import signal

import pytest
import torch

from engine.data.sequences import DocumentSequences, WindowSequences
from engine.data.token_file import TokenFile
from engine.training import loop
from engine.training.config import TrainConfig
from tests.support.make_tokenizer import make_tokenizer
from tests.support.tiny_model import TinyModel, TinyModelArgs
from tests.support.token_files import pretrain_files

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, and all it starts


@pytest.fixture
def training(tmp_path):
    """A folder with a tokenizer and data, and run(**settings): one training of the tiny model in it."""

    class TinyTraining:
        path, tokenizer = tmp_path, make_tokenizer(tmp_path / "tokenizer")

        def __init__(self):
            train, val = pretrain_files(tmp_path / "data", self.tokenizer)
            self.sequences = WindowSequences(TokenFile(train, self.tokenizer, "make"), 32)
            self.val = DocumentSequences(TokenFile(val, self.tokenizer, "make"), 32, pack=True)

        def run(self, model_fields=(), sequences=None, model_class=TinyModel, **settings):
            defaults = dict(
                model_name="tiny",
                max_batch_size=4,
                max_steps=6,
                log_interval=1,
                save_interval=0,
                device="cpu",
                sample_interval=0,
                eval_interval=0,
                output_path=str(tmp_path / "output"),
                max_lr=0.01,
            )
            config = TrainConfig(**{**defaults, **settings})
            torch.manual_seed(config.seed)
            args = TinyModelArgs(vocab_size=self.tokenizer.vocab_size, max_seq_len=32, **dict(model_fields))
            self.model = model_class(args)
            return loop.train(
                config,
                "pretrain",
                self.model,
                self.tokenizer,
                sequences or self.sequences,
                self.val,
                "python next.py {run}",
            )

        def weights(self):
            return {name: value.clone() for name, value in self.model.state_dict().items()}

    return TinyTraining()
