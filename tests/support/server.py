"""A server of a small model with random weights, in a thread of the test's process."""

import contextlib
import functools
import tempfile
import threading
import time
from pathlib import Path

import openai
import torch

from engine.inference.chat import Speaker
from engine.inference.worker import Service
from engine.serving.app import make_app
from engine.serving.server import listen, make_server
from model import get_model_and_args
from serve import ServeConfig
from tests.support.models import CHAT_MODEL
from tests.support.small_runs import SIZES, poem_tokenizer

NAME, MODEL = "sft_tiny", CHAT_MODEL
LONGEST = 128


@functools.cache
def make_speaker(name=MODEL, stage="sft"):
    """A Speaker whose model is far from uniform, so that its likeliest token is no matter of rounding."""
    tokenizer = poem_tokenizer(Path(tempfile.mkdtemp(prefix="serving_")) / "tokenizer")
    Model, ModelArgs = get_model_and_args(name)
    known = ModelArgs.__dataclass_fields__
    torch.manual_seed(3)
    model = Model(
        ModelArgs(
            vocab_size=tokenizer.vocab_size,
            max_seq_len=LONGEST,
            **{key: value for key, value in SIZES.items() if key in known},
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return Speaker(model.eval(), tokenizer, stage)


class Running:
    """A server that answers: its address, and what it is made of."""

    def __init__(self, url, service, config, speaker):
        self.url, self.service, self.config, self.speaker = url, service, config, speaker

    def client(self, kind=openai.OpenAI, **more):
        return kind(
            **{
                "base_url": self.url + "/v1",
                "api_key": self.config.api_key or "none",
                "max_retries": 0,
                "timeout": 60,
                **more,
            }
        )

    def until_idle(self):
        """Wait until nobody is being answered; fails when that takes long."""
        end = time.monotonic() + 20
        while self.service.batch.busy:
            assert time.monotonic() < end, "a request is still there"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(speaker=None, **settings):
    """Start a server on a free port and stop it behind."""
    speaker = speaker or make_speaker()
    config = ServeConfig(**{"port": 0, "max_new_tokens": 16, "temperature": 1.0, "top_p": 1.0, **settings})
    listener = listen(config.host, config.port)
    with Service(speaker.model, config.max_batch_size, config.max_queue) as service:
        server = make_server(make_app(NAME, speaker, service, config), service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, config, speaker)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
