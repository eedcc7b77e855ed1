"""The way of requests from a handler through the batch to the client, as a whole or in chunks, while it listens."""

import asyncio
import contextlib
import secrets
import time

from starlette.responses import Response

from engine.inference.scheduler import QueueFull
from engine.serving.errors import ApiError, busy
from engine.serving.formats import CachedTokens, News, Usage

SEND_SECONDS = 30  # for a slow reader to take what is there, after the deadline


class Following(Response):
    """Hand requests to the batch and tell the client what comes of them.

    Nothing is sent before the first token, so that whatever goes wrong until then has a status of its own. A client
    that leaves takes its requests out of the batch, and so does anything else that ends this early.
    """

    def __init__(self, server, shape, requests, stream=False, usage_chunk=False):
        self.background = None
        self.server, self.shape, self.requests = server, shape, requests
        self.stream, self.usage_chunk = stream, usage_chunk
        self.news = [News(request, server.tokenizer) for request in requests]
        self.head = {
            "id": shape.prefix + secrets.token_hex(12),
            "object": shape.chunk if stream else shape.object,
            "created": int(time.time()),
            "model": server.name,
        }
        self.moved, self.gone, self.started = asyncio.Event(), False, False

    async def __call__(self, scope, receive, send):
        loop, start = asyncio.get_running_loop(), time.monotonic()

        def notify():  # in the batch's thread
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile: nobody is left to be told
                loop.call_soon_threadsafe(self.moved.set)

        for request in self.requests:
            request.notify, request.deadline = notify, start + self.server.config.request_timeout
        try:
            self.server.service.submit(*self.requests)
        except QueueFull:
            raise busy("the queue is full: try again later") from None
        leaving = asyncio.create_task(self._watch(receive))
        try:
            async with asyncio.timeout(self.server.config.request_timeout + SEND_SECONDS):
                while not any(request.tokens or request.finish for request in self.requests):
                    await self._move()
                if self.gone:
                    return
                if any(request.tokens for request in self.requests):
                    self.server.metrics.first_token.observe(time.monotonic() - start)
                await (self._tell_in_chunks(send) if self.stream else self._tell_whole(scope, receive, send))
        except TimeoutError:  # a client that does not read: uvicorn closes the connection
            if not self.started:
                raise ApiError(503, "the server is too slow for its deadline") from None
        finally:
            leaving.cancel()
            for request in self.requests:
                request.cancelled = True  # of no consequence where it has ended
            self.server.metrics.answered(self.requests)

    async def _watch(self, receive):
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        for request in self.requests:
            request.cancelled = True

    async def _move(self):
        await self.moved.wait()
        self.moved.clear()

    async def _tell_whole(self, scope, receive, send):
        while not all(request.finish for request in self.requests):
            await self._move()
        if self.gone:
            return
        for request in self.requests:
            check(request)
        self.started = True
        choices = [self.shape.whole(index, *news()) for index, news in enumerate(self.news)]
        await Response(self._json(choices, usage=self._usage()), media_type="application/json")(scope, receive, send)

    async def _tell_in_chunks(self, send):
        for request in self.requests:
            if request.finish and not request.tokens:
                check(request)
        self.started = True
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")],
            }
        )

        async def event(data):
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

        try:
            async for chunk in self._chunks():
                await event(chunk)
            await event(b"[DONE]")
        except ApiError as error:  # too late for a status
            await event(error.response().body)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self):
        blank = {"usage": None} if self.usage_chunk else {}
        for index in range(len(self.requests)):
            if opening := self.shape.opening(index):
                yield self._json([opening], **blank)
        left = list(range(len(self.requests)))
        while left:
            for index in list(left):
                text, entries, finish = self.news[index]()
                if text or entries:
                    yield self._json([self.shape.piece(index, text, entries, None)], **blank)
                if finish:
                    check(self.requests[index])
                    yield self._json([self.shape.piece(index, "", None, finish)], **blank)
                    left.remove(index)
            if left:
                await self._move()
        if self.usage_chunk:
            yield self._json([], usage=self._usage())

    def _json(self, choices, **more):
        return self.shape.answer(**self.head, choices=choices, **more).model_dump_json(exclude_unset=True).encode()

    def _usage(self):
        prompts = {id(request.ids): request for request in self.requests}.values()  # n answers share their prompt
        read, written = sum(len(r.ids) for r in prompts), sum(len(r.tokens) for r in self.requests)
        return Usage(
            prompt_tokens=read,
            completion_tokens=written,
            total_tokens=read + written,
            prompt_tokens_details=CachedTokens(cached_tokens=sum(r.reused for r in prompts)),
        )


def check(request):
    """ApiError when there is no answer to tell: a deadline that came while it was written is an answer cut short."""
    if request.finish == "error":
        raise ApiError(500, request.error)
    if request.finish == "cancelled":
        raise ApiError(503, "the server is shutting down")
    if request.finish == "deadline" and not request.tokens:
        raise busy("the request's turn did not come in time: try again later")
