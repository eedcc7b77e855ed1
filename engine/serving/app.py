"""The addresses of the server: OpenAI's, /health and /metrics."""

import asyncio
import time
from dataclasses import dataclass

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.responses import PlainTextResponse, Response

from engine.inference.generate import new_request
from engine.inference.sampling import Sampling
from engine.serving.errors import ApiError, handle_errors
from engine.serving.formats import ChatAnswer, ChatShape, ErrorAnswer, Model, Models, TextAnswer, TextShape
from engine.serving.metrics import Metrics
from engine.serving.middleware import Door
from engine.serving.responses import Following
from engine.serving.schemas import ChatBody, CompletionBody
from utils.chat_template import encode_chat


@dataclass
class Server:
    """What the handlers share."""

    name: str  # of the model, as clients call it
    speaker: object  # engine.chat.Speaker
    service: object  # engine.service.Service
    config: object  # serve.ServeConfig
    metrics: Metrics

    def __post_init__(self):
        self.tokenizer, self.created = self.speaker.tokenizer, int(time.time())

    def answer(self, body, shape, prompts):
        """Answer prompts (lists of ids) as a body asks."""
        args = self.speaker.model.args
        for ids in prompts:
            if len(ids) >= args.max_seq_len:
                raise ApiError(
                    400,
                    f"the prompt has {len(ids)} tokens, and the model takes {args.max_seq_len}, answer "
                    "included: shorten it",
                    "context_length_exceeded",
                )
        if len(prompts) * (body.n or 1) > self.config.max_queue:
            raise ApiError(400, f"this server takes at most {self.config.max_queue} answers at once: ask for fewer")
        sampling = Sampling(**self.config.sampling() | body.sampling())
        requests = [
            new_request(
                self.tokenizer,
                ids,
                body.longest() or self.config.max_new_tokens,
                sampling.of_row(row),
                stop=body.stops(),
                text=True,
                top_logprobs=body.top(),
            )
            for ids in prompts
            for row in range(body.n or 1)
        ]
        usage_chunk = body.stream_options is not None and body.stream_options.include_usage
        return Following(self, shape, requests, bool(body.stream), usage_chunk)

    def check_model(self, name):
        if name not in (None, self.name):
            raise ApiError(
                404,
                f"there is no such model here: /v1/models lists what there is ({self.name})",
                "model_not_found",
                "model",
            )


def make_app(name, speaker, service, config):
    """The ASGI app. `config` has max_queue, max_body_bytes, request_timeout, api_key and the settings of an answer."""
    server = Server(name, speaker, service, config, Metrics(service.batch))
    # FastAPI's pages of documentation would load scripts from elsewhere; the schema is at /openapi.json.
    app = FastAPI(
        title="Mini-LLM",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
    )
    handle_errors(app)
    keyed = [Depends(HTTPBearer(auto_error=False))] if config.api_key else []  # for the schema: Door looks at it

    streamed = {200: {"content": {"text/event-stream": {}}}}  # beside JSON

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not service.alive:
            raise ApiError(503, "the thread of the batch has ended: start the server again")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=keyed)
    async def metrics():
        return Response(server.metrics.page(), media_type="text/plain; version=1.0.0; charset=utf-8")

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> Models:
        return Models(data=[Model(id=name, created=server.created)])

    @app.get("/v1/models/{model}", dependencies=keyed)
    async def model(model: str) -> Model:
        server.check_model(model)
        return Model(id=name, created=server.created)

    @app.post("/v1/chat/completions", response_model=ChatAnswer, responses=streamed, dependencies=keyed)
    async def chat(body: ChatBody):
        server.check_model(body.model)
        if speaker.is_base:
            raise ApiError(
                400,
                f"{name} is a base model and has seen no conversation: use /v1/completions, or serve a fine-tuned run",
            )
        messages = [message.plain() for message in body.messages]
        ids, _ = await asyncio.to_thread(encode_chat, speaker.tokenizer, messages, add_generation_prompt=True)
        return server.answer(body, ChatShape, [ids])

    @app.post("/v1/completions", response_model=TextAnswer, responses=streamed, dependencies=keyed)
    async def completion(body: CompletionBody):
        server.check_model(body.model)
        prompts = body.prompts()
        if isinstance(prompts[0], str):
            encoded = await asyncio.to_thread(speaker.tokenizer.encode_batch, prompts)
            prompts = [[speaker.tokenizer.bos_id, *ids] for ids in encoded]
        return server.answer(body, TextShape, prompts)

    paths = {route.path for route in app.routes}
    return server.metrics.around(Door(app, config.api_key, config.max_body_bytes), paths)
