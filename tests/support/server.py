"""A server of a small model with random weights, in a thread of the test's process."""

import contextlib
import functools
import tempfile
import threading
import time
from pathlib import Path

import openai
import torch

from engine.inference.chat import ChatModel
from engine.runs.registry import LoadedRun
from engine.serving.app import make_app
from engine.serving.server import make_server, open_socket
from model import get_model_and_args
from serve import ServeConfig
from tests.support.models import CHAT_MODEL, sizes_of
from tests.support.small_runs import SIZES, poem_tokenizer

NAME, MODEL = "sft_tiny", CHAT_MODEL
MAX_SEQ_LEN = 128


@functools.cache
def make_run(name=MODEL, stage="sft"):
    """A LoadedRun whose model is far from uniform, so that its likeliest token does not depend on rounding."""
    tokenizer = poem_tokenizer(Path(tempfile.mkdtemp(prefix="serving_")) / "tokenizer")
    Model, ModelArgs = get_model_and_args(name)
    torch.manual_seed(3)
    model = Model(ModelArgs(vocab_size=tokenizer.vocab_size, max_seq_len=MAX_SEQ_LEN, **sizes_of(name, SIZES)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return LoadedRun(model.eval(), tokenizer, {"stage": stage}, Path(NAME), Path(NAME) / "final", "")


class RunningServer:
    """A server that answers: its address, and what it is made of."""

    def __init__(self, url, chat_model, config):
        self.url = url
        self.config = config
        self.model = chat_model.model
        self.tokenizer = chat_model.tokenizer
        self.scheduler = chat_model.worker.scheduler

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

    def wait_until_idle(self):
        """Wait until no request is left; fails after 20 s."""
        end = time.monotonic() + 20
        while self.scheduler.busy:
            assert time.monotonic() < end, "a request is still there"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(run=None, **settings):
    """Start a server on a free port, and stop it at the end."""
    config = ServeConfig(**{"port": 0, "max_new_tokens": 16, "temperature": 1.0, "top_p": 1.0, **settings})
    listener = open_socket(config.host, config.port)
    with ChatModel(run or make_run(), slots=config.max_batch_size, max_queue=config.max_queue) as chat_model:
        server = make_server(make_app(NAME, chat_model, config), chat_model.close)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield RunningServer(f"http://127.0.0.1:{listener.getsockname()[1]}", chat_model, config)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
