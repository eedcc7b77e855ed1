"""Responses that submit requests to the worker and relay their tokens, streamed or at once, until the client leaves."""

import asyncio
import contextlib
import secrets
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from engine.inference.detokenizer import StreamDetokenizer
from engine.inference.request import Logprobs, Request
from engine.inference.scheduler import QueueFull
from engine.inference.worker import BatchWorker
from engine.serving.errors import ApiError, busy
from engine.serving.metrics import Metrics
from engine.serving.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    GenerationResponse,
    PromptTokensDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from utils.tokenizer import Tokenizer

SEND_SECONDS = 30  # after the deadline, for a slow client to read what is there
T = TypeVar("T")


class TokenEntry(NamedTuple):
    """A token with its log-probability, as the model computed it."""

    token: bytes
    logprob: float | None  # None: nothing comes before the token
    top: list[tuple[bytes, float]] | None  # the alternatives, likeliest first
    text_offset: int  # characters of the text before this token


class Delta(NamedTuple):
    """What a request gained since the last delta."""

    text: str
    tokens: list[TokenEntry] | None  # None when no log-probabilities were asked for
    finish: FinishReason | None


class DeltaTracker:
    """Yields the deltas of one request: new text, and the tokens that are part of it.

    echo_from: the prompt from this token on comes first; None: it does not.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, echo_from: int | None = None) -> None:
        assert request.detokenizer is not None
        self.request = request
        self.detokenizer = request.detokenizer
        self.tokenizer = tokenizer
        self.echo_from = echo_from
        self.is_echoed = echo_from is None
        self.offset = 0  # characters of the echoed prompt
        self.chars = 0
        self.tokens = 0

    def next(self) -> Delta:
        finish = self.request.finish  # read first: all that is read after it is complete
        wants_logprobs = self.request.top_logprobs is not None
        if not self.request.tokens and not finish:  # the prompt may not have been read
            return Delta("", [] if wants_logprobs else None, None)
        text, entries = self._echo()
        new = self.request.text[self.chars :]
        self.chars += len(new)
        first = self.tokens
        if finish and not self.detokenizer.stopped:
            self.tokens = len(self.detokenizer.starts)
        else:
            self.tokens = bisect_left(self.detokenizer.starts, self.chars)
        if wants_logprobs:
            entries += [self._answer_entry(index) for index in range(first, self.tokens)]
            if finish and self.echo_from is not None and self.request.stop_token is not None:
                entries.append(self._entry(*self.request.stop_token, self.chars))
        ended: FinishReason | None = None if finish is None else "stop" if finish == "stop" else "length"
        return Delta(text + new, entries if wants_logprobs else None, ended)

    def _echo(self) -> tuple[str, list[TokenEntry]]:
        """The text and the tokens of the prompt, once; the first token has nothing before it."""
        if self.is_echoed:
            return "", []
        self.is_echoed = True
        ids = self.request.ids[self.echo_from :]
        detokenizer = StreamDetokenizer(self.tokenizer)
        for token in ids:
            detokenizer.push(token)
        detokenizer.close()
        entries = []
        if self.request.top_logprobs is not None:
            known = [None, *self.request.prompt_logprobs[len(self.request.ids) - len(ids) :]]
            entries = [self._entry(*each) for each in zip(ids, known, detokenizer.starts)]  # fewer if it was cancelled
        self.offset = len(detokenizer.text)
        return detokenizer.text, entries

    def _answer_entry(self, index: int) -> TokenEntry:
        request = self.request
        return self._entry(request.tokens[index], request.logprobs[index], self.detokenizer.starts[index])

    def _entry(self, token: int, logprobs: Logprobs | None, start: int) -> TokenEntry:
        token_bytes = self.tokenizer.token_bytes
        if logprobs is None:
            return TokenEntry(token_bytes(token), None, None, self.offset + start)
        own, top = logprobs
        alternatives = [(token_bytes(other), json_logprob(value)) for other, value in top.items()]
        return TokenEntry(token_bytes(token), json_logprob(own), alternatives, self.offset + start)


def json_logprob(logprob: float) -> float:
    """The log-probability with -9999 for minus infinity, which JSON does not have."""
    return max(logprob, -9999.0)


def token_text(token: bytes) -> str:
    r"""A token's text; bytes that are no complete character as OpenAI writes them, `bytes:\xe6\x98`."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def chat_logprobs(entries: list[TokenEntry]) -> ChatLogprobs:
    def fields(token: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": token_text(token), "logprob": logprob, "bytes": list(token)}

    return ChatLogprobs(
        content=[
            TokenLogprob(
                **fields(entry.token, entry.logprob),
                top_logprobs=[TopLogprob(**fields(*pair)) for pair in entry.top or ()],
            )
            for entry in entries
        ]
    )


def completion_logprobs(entries: list[TokenEntry]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[token_text(entry.token) for entry in entries],
        token_logprobs=[entry.logprob for entry in entries],
        top_logprobs=[top_by_text(entry) for entry in entries],
        text_offset=[entry.text_offset for entry in entries],
    )


def top_by_text(entry: TokenEntry) -> dict[str, float] | None:
    """The alternatives and, if it is none of them, the token itself; of those with one text, the likeliest."""
    if entry.top is None or entry.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in [*entry.top, (entry.token, entry.logprob)]:
        found.setdefault(token_text(token), logprob)
    return found


def first_chat_chunk(index: int) -> ChatChoice:
    delta = AssistantMessage(role="assistant", content="")
    return ChatChoice(index=index, delta=delta, logprobs=None, finish_reason=None)


def chat_chunk(index: int, delta: Delta) -> ChatChoice:
    return ChatChoice(
        index=index,
        delta=AssistantMessage(content=delta.text) if delta.finish is None else AssistantMessage(),
        logprobs=chat_logprobs(delta.tokens) if delta.tokens else None,
        finish_reason=delta.finish,
    )


def chat_choice(index: int, delta: Delta) -> ChatChoice:
    return ChatChoice(
        index=index,
        message=AssistantMessage(role="assistant", content=delta.text),
        logprobs=None if delta.tokens is None else chat_logprobs(delta.tokens),
        finish_reason=delta.finish,
    )


def completion_choice(index: int, delta: Delta) -> CompletionChoice:
    logprobs = None if delta.tokens is None else completion_logprobs(delta.tokens)
    return CompletionChoice(index=index, text=delta.text, finish_reason=delta.finish, logprobs=logprobs)


@dataclass(frozen=True)
class Format:
    """How one endpoint writes its choices."""

    id_prefix: str
    object: str
    chunk_object: str
    schema: Callable[..., GenerationResponse]
    choice: Callable[[int, Delta], Any]
    chunk: Callable[[int, Delta], Any]
    first_chunk: Callable[[int], Any] | None = None


CHAT_FORMAT = Format(
    "chatcmpl-", "chat.completion", "chat.completion.chunk", ChatCompletion, chat_choice, chat_chunk, first_chat_chunk
)
COMPLETION_FORMAT = Format(
    "cmpl-", "text_completion", "text_completion", Completion, completion_choice, completion_choice
)


class CompletionResponse(Response):
    """Submits requests to the worker and sends their tokens as they come, or all at the end.

    Nothing is sent before the first token, so that a failure until then has its own status. When the client
    disconnects, or anything else ends the response early, its requests are cancelled.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        format: Format,
        *,
        model_name: str,
        tokenizer: Tokenizer,
        worker: BatchWorker,
        metrics: Metrics,
        timeout: float,
        stream: bool = False,
        include_usage: bool = False,
        echo_from: int | None = None,
    ) -> None:
        """echo_from: of each prompt, the tokens from this one on come before the answer; None: none do."""
        self.background = None
        self.requests = requests
        self.format = format
        self.worker = worker
        self.metrics = metrics
        self.timeout = timeout  # seconds until the deadline of the requests
        self.stream = stream
        self.include_usage = include_usage
        self.trackers = [DeltaTracker(request, tokenizer, echo_from) for request in requests]
        self.head: dict[str, Any] = {
            "id": format.id_prefix + secrets.token_hex(12),
            "object": format.chunk_object if stream else format.object,
            "created": int(time.time()),
            "model": model_name,
        }
        self.progress = asyncio.Event()  # set when a request gained a token or ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._submit()
        response = None
        try:
            async with asyncio.timeout(self.timeout + SEND_SECONDS):
                response = await unless_disconnected(receive, self._make_response())
                if response is not None:
                    await response(scope, receive, send)
        except TimeoutError:  # uvicorn closes the connection of a client that does not read
            if response is None:
                raise ApiError(503, "the server is too slow for its deadline") from None
        finally:
            for request in self.requests:
                request.cancelled = True  # has no effect on a finished request
            self.metrics.count_finished(self.requests)

    def _submit(self) -> None:
        loop = asyncio.get_running_loop()
        self.start = time.monotonic()

        def notify() -> None:  # runs in the worker's thread
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self.progress.set)

        for request in self.requests:
            request.notify = notify
            request.deadline = self.start + self.timeout
        try:
            self.worker.submit(*self.requests)
        except QueueFull:
            raise busy("the queue is full: try again later") from None

    async def _wait_for_progress(self) -> None:
        await self.progress.wait()
        self.progress.clear()

    async def _make_response(self) -> Response:
        """Wait for the first token, or without `stream` for all of them; ApiError when there is nothing to send."""
        while not any(request.tokens or request.finish for request in self.requests):
            await self._wait_for_progress()
        if any(request.tokens for request in self.requests):
            self.metrics.first_token.observe(time.monotonic() - self.start)
        if self.stream:
            for request in self.requests:
                if not request.tokens:
                    raise_if_failed(request)
            headers = {"cache-control": "no-store"}
            return StreamingResponse(self._events(), media_type="text/event-stream", headers=headers)
        while not all(request.finish for request in self.requests):
            await self._wait_for_progress()
        for request in self.requests:
            raise_if_failed(request)
        choices = [self.format.choice(index, tracker.next()) for index, tracker in enumerate(self.trackers)]
        return Response(self._json(choices, usage=self._usage()), media_type="application/json")

    async def _events(self) -> AsyncIterator[bytes]:
        """Server-sent events; a failure after the first token is the last of them."""
        try:
            async for chunk in self._chunks():
                yield b"data: " + chunk + b"\n\n"
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield b"data: " + bytes(error.response().body) + b"\n\n"

    async def _chunks(self) -> AsyncIterator[bytes]:
        usage = {"usage": None} if self.include_usage else {}
        for index in range(len(self.requests)):
            if self.format.first_chunk is not None:
                yield self._json([self.format.first_chunk(index)], **usage)
        running = list(range(len(self.requests)))
        while running:
            for index in list(running):
                delta = self.trackers[index].next()
                if delta.text or delta.tokens:
                    yield self._json([self.format.chunk(index, delta._replace(finish=None))], **usage)
                if delta.finish:
                    raise_if_failed(self.requests[index])
                    yield self._json([self.format.chunk(index, Delta("", None, delta.finish))], **usage)
                    running.remove(index)
            if running:
                await self._wait_for_progress()
        if self.include_usage:
            yield self._json([], usage=self._usage())

    def _json(self, choices: list[Any], **fields: Any) -> bytes:
        response = self.format.schema(**self.head, choices=choices, **fields)
        return response.model_dump_json(exclude_unset=True).encode()

    def _usage(self) -> Usage:
        prompts = {id(request.ids): request for request in self.requests}.values()  # n choices share their prompt
        prompt_tokens = sum(len(request.ids) for request in prompts)
        completion_tokens = sum(len(request.tokens) for request in self.requests)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(request.cached_tokens for request in prompts)),
        )


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None, with `work` cancelled, when the client disconnects first."""
    working = asyncio.create_task(work)
    disconnect = asyncio.create_task(wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, disconnect), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        disconnect.cancel()


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def raise_if_failed(request: Request) -> None:
    """ApiError when a request ended without an answer; one cut short by its deadline is an answer."""
    if request.finish == "error":
        raise ApiError(500, request.error)
    if request.finish == "cancelled":
        raise ApiError(503, "the server is shutting down")
    if request.finish == "deadline" and not request.tokens:
        raise busy("the request's turn did not come in time: try again later")
