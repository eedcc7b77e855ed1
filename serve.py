"""Serve a trained model to any client of OpenAI's API: http://127.0.0.1:8000/v1

python serve.py                                    the newest run in output/, a chat if it has been fine-tuned
python serve.py --run output/pretrain_MODEL        a base model: /v1/completions
MINI_LLM_API_KEY=... python serve.py --host ADDRESS  on that address of this machine too; TLS is a proxy's work

The settings of an answer are the defaults of requests that do not have them.
"""

import contextlib
import os
import signal
from dataclasses import dataclass

from engine.inference.options import TalkOptions
from utils.config import opt, parse
from utils.errors import UserError, run_script
from utils.log import log

LOCAL = ("127.0.0.1", "::1", "localhost")
KEY_VARIABLE = "MINI_LLM_API_KEY"
SHORTEST_KEY = 16


@dataclass
class ServeConfig(TalkOptions):
    __doc__ = __doc__
    run: str = opt("", "run folder (empty: the newest in output_path, fine-tuned before base)", path=True)
    host: str = opt("127.0.0.1", "address to listen on; any but this machine's own needs an API key")
    port: int = opt(8000, "0 takes a free one")
    api_key: str = opt("", f"clients must send it ({KEY_VARIABLE} in the environment keeps it out of the process list)")
    compile: bool = opt(False, "compile the step that writes a token: minutes at the start, then faster")
    max_batch_size: int = opt(8, "requests answered at once; each takes memory for max_seq_len tokens")
    max_queue: int = opt(64, "requests that wait for their turn; the next one is told to come again (429)")
    request_timeout: float = opt(300.0, "seconds to a request's deadline; what is written by then is the answer")
    max_body_bytes: int = opt(2**20, "largest body of a request")

    def __post_init__(self):
        self.api_key = self.api_key or os.environ.get(KEY_VARIABLE, "")
        for name, least, most in (
            ("port", 0, 65535),
            ("max_batch_size", 1, 4096),
            ("max_queue", 1, 10**6),
            ("request_timeout", 0.001, 10**6),
            ("max_body_bytes", 1, 2**30),
            ("max_new_tokens", 1, 2**31),
        ):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"--{name}={getattr(self, name)} is out of range: give {least} to {most}")
        if self.host not in LOCAL and not self.api_key:
            raise UserError(
                f"--host={self.host} lets other machines in: set an API key by --api_key or "
                f"{KEY_VARIABLE}, or leave --host out"
            )
        if self.api_key and not (
            len(self.api_key) >= SHORTEST_KEY
            and self.api_key.isascii()
            and self.api_key.isprintable()
            and " " not in self.api_key
        ):
            raise UserError(
                f"the API key must have {SHORTEST_KEY} or more characters, ASCII without spaces: make one "
                'by python -c "import secrets; print(secrets.token_urlsafe())"'
            )


def main():
    config = parse(ServeConfig)
    from engine.serving.server import listen, make_server

    listener = listen(config.host, config.port)  # what is wrong with it is told before the model is loaded
    from engine.inference.chat import choose_run, open_speaker  # torch comes with it
    from engine.inference.sampling import Sampling
    from engine.inference.worker import Service
    from engine.serving.app import make_app

    Sampling(**config.sampling())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    path = config.run or choose_run(config.output_path)
    speaker = open_speaker(path, config.device, config.precision, config.compile, rows=config.max_batch_size)
    name = speaker.run.path.name
    with Service(speaker.model, config.max_batch_size, config.max_queue) as service:
        server = make_server(make_app(name, speaker, service, config), service)
        host, port = listener.getsockname()[:2]
        log(f"{name} answers at http://{f'[{host}]' if ':' in host else host}:{port}/v1 · Ctrl-C ends")
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


if __name__ == "__main__":
    run_script(main)
