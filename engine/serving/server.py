"""The socket and HTTP/1.1: uvicorn, with limits that it has not, and an end without loose ends."""

import asyncio
import json
import socket

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.serving.errors import ApiError
from utils.errors import UserError

SEND_SECONDS = 10  # for a request's head, and for the rest of a body that is not wanted
END_SECONDS = 5  # for connections to close when the server ends
MOST_HEAD_BYTES = 32 * 1024
MOST_CONNECTIONS = 512


def listen(host, port):
    """A socket that listens; UserError when there is no such address or the port is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror}): choose another --host or --port"
        ) from None


def make_server(app, service):
    """A server whose `run(sockets=[...])` returns after SIGINT or SIGTERM, or when `should_exit` is set."""
    return Server(
        service,
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_level="error",
            server_header=False,
            headers=[("X-Content-Type-Options", "nosniff")],
            proxy_headers=False,
            timeout_graceful_shutdown=END_SECONDS,
            h11_max_incomplete_event_size=MOST_HEAD_BYTES,
        ),
    )


class Server(uvicorn.Server):
    """uvicorn's; at its end the requests end first, so that their clients hear of it."""

    def __init__(self, service, config):
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets=None):
        await asyncio.to_thread(self.service.close)
        await super().shutdown(sockets)


class Protocol(H11Protocol):
    """A connection. uvicorn waits for ever for the rest of a head: a few hundred such clients would stop a server."""

    _timer = None

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._watch()

    def data_received(self, data):
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc):
        self._stop()
        super().connection_lost(exc)

    def _watch(self):
        if self.conn.our_state not in (h11.IDLE, h11.DONE):  # it is our turn
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def _stop(self):
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def send_400_response(self, msg):
        if self.cycle is not None:  # a request whose body broke off is as one whose client has left
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps(ApiError(400, msg).body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        try:
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        except h11.LocalProtocolError:  # in the middle of an answer
            pass
        self.transport.close()
