"""The endpoints of the server: OpenAI's, /health and /metrics."""

import asyncio
import time
from typing import Any

from fastapi import Depends, FastAPI
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from engine.inference.chat import ChatModel
from engine.inference.generate import new_request
from engine.inference.sampling import Sampling
from engine.serving.errors import ApiError, install_error_handlers
from engine.serving.metrics import Metrics, MetricsMiddleware
from engine.serving.middleware import AccessMiddleware, BodyMiddleware, bearer
from engine.serving.options import ServingOptions
from engine.serving.responses import CHAT_FORMAT, COMPLETION_FORMAT, CompletionResponse, Format
from engine.serving.schemas import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    ErrorResponse,
    GenerationRequest,
    HealthResponse,
    ModelCard,
    ModelList,
)
from utils.version import VERSION


class Endpoints:
    """Turns the bodies of requests into responses of one chat model."""

    def __init__(self, name: str, chat_model: ChatModel, options: ServingOptions) -> None:
        self.name = name  # of the model, as clients call it
        self.chat_model = chat_model
        self.options = options
        self.metrics = Metrics(chat_model.worker.scheduler)
        self.created = int(time.time())

    def health(self) -> HealthResponse:
        if not self.chat_model.worker.alive:
            raise ApiError(503, "the worker thread has ended: start the server again")
        return HealthResponse(version=VERSION)

    def model_card(self, name: str) -> ModelCard:
        self.check_model_name(name)
        return ModelCard(id=self.name, created=self.created)

    async def chat(self, body: ChatCompletionRequest) -> Response:
        self.check_model_name(body.model)
        if self.chat_model.is_base:
            raise ApiError(
                400,
                f"{self.name} is a base model and has seen no conversation: use /v1/completions, "
                "or serve a fine-tuned run",
            )
        messages = [message.to_dict() for message in body.messages]
        ids, _ = await asyncio.to_thread(self.chat_model.prompt_ids, messages)
        return self.respond(body, CHAT_FORMAT, [ids])

    async def complete(self, body: CompletionRequest) -> Response:
        self.check_model_name(body.model)
        prompts = body.prompts()
        n_added = 0  # tokens that are put before a text
        if isinstance(prompts[0], str):
            n_added = len(self.chat_model.tokenizer.prefix_ids)
            self.check_echo(body)
            prompts = await asyncio.to_thread(lambda: [self.chat_model.text_ids(text) for text in body.prompts()])
        return self.respond(body, COMPLETION_FORMAT, prompts, n_added if body.echo else None)

    def check_echo(self, body: CompletionRequest) -> None:
        """ApiError for a text whose log-probabilities are asked for and that spells out the tokens of a beginning.

        A client that decodes its own token ids sends them so, and would read the figures of other tokens.
        """
        if not body.echo or body.n_top_logprobs() is None:
            return
        name = b"".join(map(self.chat_model.tokenizer.token_bytes, self.chat_model.text_ids(""))).decode()
        if any(text.startswith(name) for text in body.prompts()):
            first = "the server puts that token first, " if self.chat_model.tokenizer.prefix_ids else ""
            raise ApiError(
                400,
                f"prompt: begins with {name}, which is ordinary text here and not the token of that name: {first}"
                "leave it out, or send token ids",
                param="prompt",
            )

    def check_model_name(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise ApiError(
                404,
                f"no such model: /v1/models lists what is served ({self.name})",
                "model_not_found",
                "model",
            )

    def respond(
        self, body: GenerationRequest, format: Format, prompts: list[list[int]], echo_from: int | None = None
    ) -> CompletionResponse:
        """The response to prompts of token ids, `body.n` choices each; echo_from: as in `CompletionResponse`."""
        options = self.options
        n_answers = len(prompts) * body.n_choices()
        if n_answers > options.max_queue:
            raise ApiError(
                400,
                f"this server takes at most {options.max_queue} answers at once, not {n_answers}: ask for fewer, or "
                "start it with a larger --max_queue",
            )
        max_new_tokens = body.max_new_tokens()
        n_top = body.n_top_logprobs()
        sampling = Sampling(**options.sampling() | body.sampling())
        requests = [
            new_request(
                self.chat_model.tokenizer,
                ids,
                options.max_new_tokens if max_new_tokens is None else max_new_tokens,
                sampling.offset_seed(choice),
                self.chat_model.stop_ids,
                stop=body.stop_strings(),
                text=True,
                top_logprobs=n_top,
                score_prompt=echo_from is not None and n_top is not None,
            )
            for ids in prompts
            for choice in range(body.n_choices())
        ]
        return CompletionResponse(
            requests,
            format,
            model_name=self.name,
            tokenizer=self.chat_model.tokenizer,
            worker=self.chat_model.worker,
            metrics=self.metrics,
            timeout=options.request_timeout,
            stream=bool(body.stream),
            include_usage=body.include_usage(),
            echo_from=echo_from,
        )


def make_app(name: str, chat_model: ChatModel, options: ServingOptions) -> ASGIApp:
    """The ASGI app that serves one chat model under `name`."""
    endpoints = Endpoints(name, chat_model, options)
    # FastAPI's documentation pages would load scripts from other hosts; the schema is at /openapi.json.
    app = FastAPI(
        title="Mini-LLM",
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
    )
    install_error_handlers(app)
    app.add_middleware(BodyMiddleware, max_body_bytes=options.max_body_bytes)
    app.add_middleware(AccessMiddleware, api_key=options.api_key)  # added last, runs first
    add_routes(app, endpoints, needs_key=bool(options.api_key))
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    return MetricsMiddleware(app, endpoints.metrics, paths)  # around the app's own handler of status 500


def add_routes(app: FastAPI, endpoints: Endpoints, needs_key: bool) -> None:
    key = [Depends(bearer)] if needs_key else []  # for the schema only: AccessMiddleware checks it
    streamed: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}  # besides JSON

    @app.get("/health")
    async def health() -> HealthResponse:
        return endpoints.health()

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=key)
    async def metrics() -> Response:
        return Response(endpoints.metrics.render(), media_type="text/plain; version=1.0.0; charset=utf-8")

    @app.get("/v1/models", dependencies=key)
    async def models() -> ModelList:
        return ModelList(data=[endpoints.model_card(endpoints.name)])

    @app.get("/v1/models/{model}", dependencies=key)
    async def model(model: str) -> ModelCard:
        return endpoints.model_card(model)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=streamed, dependencies=key)
    async def chat(body: ChatCompletionRequest) -> Response:
        return await endpoints.chat(body)

    @app.post("/v1/completions", response_model=Completion, responses=streamed, dependencies=key)
    async def completion(body: CompletionRequest) -> Response:
        return await endpoints.complete(body)
