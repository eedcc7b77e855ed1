"""What every HTTP request passes first: who asks, for which host, and how much they send in how much time."""

import asyncio
import hashlib
import hmac

from engine.serving.errors import ApiError

OPEN_PATHS = {"/health"}  # for whoever watches the server: no key, and nothing to learn
LOCAL = {"127.0.0.1", "::1", "localhost"}
BODY_SECONDS = 30


class Door:
    """ASGI: refuse what may not in, and hand the rest on with its whole body.

    Without a key only names of this machine are answered: a web page whose own name was made to point here ("DNS
    rebinding") sends its own name. The content type of JSON cannot be sent from a foreign page without asking first
    (CORS), and that question is never answered by yes.
    """

    def __init__(self, app, api_key, max_body_bytes):
        self.app, self.max_body_bytes = app, max_body_bytes
        self.key = hashlib.sha256(api_key.encode()).digest() if api_key else None

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            try:
                self._check(scope["method"], scope["path"], dict(scope["headers"]))
                receive = replay(await self._body(receive), receive)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            except ConnectionError:  # the client left while it was sending
                return
        await self.app(scope, receive, send)

    def _check(self, method, path, headers):
        if self.key is None and host_name(headers.get(b"host", b"")) not in LOCAL:
            raise ApiError(403, "without an API key this server answers to localhost only: see the Host header")
        if self.key is not None and path not in OPEN_PATHS:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self.key)  # equally long, so no hint
            if scheme.lower() != b"bearer" or not same:
                raise ApiError(
                    401,
                    "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if method == "POST" and kind != b"application/json":
            raise ApiError(415, "send the body as JSON, with Content-Type: application/json")

    async def _body(self, receive):
        """The whole body, within its bounds."""
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise ConnectionError
                    body += message.get("body", b"")
                    if len(body) > self.max_body_bytes:
                        raise ApiError(
                            413, f"the body is larger than the {self.max_body_bytes} bytes that this server takes"
                        )
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS} s") from None
        return bytes(body)


def replay(body, receive):
    """A receive that gives the body first, and then what the connection says."""
    given = False

    async def again():
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def host_name(host):
    """The name in a Host header, without its port.  # b"[::1]:80" -> "::1" """
    name = host.decode("latin-1").strip().lower()
    return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
