"""ASGI middleware: API key or Host header, content type, body size and read timeout, request metrics."""

import asyncio
import hashlib
import hmac

from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.serving.errors import ApiError
from engine.serving.options import LOCAL_HOSTS

PUBLIC_PATHS = {"/health"}  # need no API key: monitors ask here, and the response holds nothing private
BODY_SECONDS = 30
bearer = HTTPBearer(auto_error=False)


class AccessMiddleware:
    """Refuses requests without the API key; without a key, requests for any host but this machine.

    The Host check stops DNS rebinding: a foreign page whose name was pointed at this machine sends its own name.
    """

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self.key_digest = hashlib.sha256(api_key.encode()).digest() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                await self._check(Request(scope))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _check(self, request: Request) -> None:
        if self.key_digest is None:
            if host_name(request.headers.get("host", "")) not in LOCAL_HOSTS:
                raise ApiError(403, "without an API key this server answers to localhost only: see the Host header")
        elif request.scope["path"] not in PUBLIC_PATHS:
            credentials = await bearer(request)
            given = credentials.credentials.encode("latin-1") if credentials else b""
            # Digests have one length, so the comparison's time depends on neither key.
            if not hmac.compare_digest(hashlib.sha256(given).digest(), self.key_digest):
                raise ApiError(
                    401,
                    "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )


class BodyMiddleware:
    """Reads the full body before the app runs, within bounds of content type, size and time.

    Requiring application/json also keeps foreign pages out: a browser sends a CORS preflight for it, which is always
    refused.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                check_content_type(scope)
                receive = replay(await self._read(receive), receive)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            except ConnectionError:  # the client disconnected while it was sending
                return
        await self.app(scope, receive, send)

    async def _read(self, receive: Receive) -> bytes:
        """The full body; ApiError 413 or 408 beyond the bounds, ConnectionError after a disconnect."""
        body = bytearray()
        more_body = True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more_body:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise ConnectionError
                    body += message.get("body", b"")
                    if len(body) > self.max_body_bytes:
                        raise ApiError(
                            413, f"the body is larger than the {self.max_body_bytes} bytes that this server takes"
                        )
                    more_body = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS} s") from None
        return bytes(body)


def check_content_type(scope: Scope) -> None:
    content_type = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
    if scope["method"] == "POST" and content_type != "application/json":
        raise ApiError(415, "send the body as JSON, with Content-Type: application/json")


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first, then the connection's later messages."""
    body_sent = False

    async def receive_again() -> Message:
        nonlocal body_sent
        if body_sent:
            return await receive()
        body_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def host_name(host: str) -> str:
    """The name in a Host header, without its port.  # "[::1]:80" -> "::1" """
    name = host.strip().lower()
    return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
