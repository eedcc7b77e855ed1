"""uvicorn plus the limits it lacks (time for a request's head, number of connections) and a graceful shutdown."""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.serving.errors import ApiError
from utils.errors import UserError

RECEIVE_SECONDS = 10  # for the head of a request, and for the rest of a refused body
SHUTDOWN_SECONDS = 5  # for connections to close
MAX_HEAD_BYTES = 32 * 1024
MAX_CONNECTIONS = 512


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; UserError when there is no such address or the port is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(address[0]), int(address[1])), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror}): choose another --host or --port"
        ) from None


def make_server(app: ASGIApp, on_shutdown: Callable[[], None]) -> "GracefulServer":
    """A server whose `run(sockets=[...])` returns after SIGINT or SIGTERM, or when `should_exit` is set.

    on_shutdown: ends the requests that are left.
    """
    config = uvicorn.Config(
        app,
        http=BoundedH11Protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level="error",
        server_header=False,
        headers=[("X-Content-Type-Options", "nosniff")],
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    return GracefulServer(config, on_shutdown)


class GracefulServer(uvicorn.Server):
    """Ends the requests before the connections, so that their clients get an error object."""

    def __init__(self, config: uvicorn.Config, on_shutdown: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_shutdown = on_shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self.on_shutdown)
        await super().shutdown(sockets)


class BoundedH11Protocol(H11Protocol):
    """One connection: closed when a request's head takes too long, or when there are too many connections.

    uvicorn waits without a limit for the rest of a head, so a few hundred such clients would block the server; its
    `limit_concurrency` refuses requests and leaves the connections open.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._update_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _update_timer(self) -> None:
        """Run the timer while the client has to send something."""
        if self.conn.our_state not in (h11.IDLE, h11.DONE):  # the response is due
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(RECEIVE_SECONDS, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def send_400_response(self, msg: str) -> None:
        """Send an error object in place of uvicorn's plain text, and treat a truncated body like a disconnect."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps(ApiError(400, msg).body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        response: list[Any] = [
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        try:
            for event in response:
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # another response has begun
            pass
        self.transport.close()
