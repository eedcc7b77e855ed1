"""serve.py under attack: a fuzzed schema, broken HTTP, endless bodies, and clients that never finish.

HOSTILE_REQUESTS=1000 sends as many of each kind.
"""

import json
import os
import random
import socket
import threading
import time

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from schemathesis.checks import load_all_checks
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from engine.inference.generate import generate
from engine.serving.schemas import ChatCompletionRequest, CompletionRequest
from tests.support.server import NAME, serving

MANY = int(os.environ.get("HOSTILE_REQUESTS", 25))


@pytest.fixture(scope="module")
def server():
    with serving(max_new_tokens=4, max_batch_size=4, request_timeout=20) as running:
        yield running


def is_healthy(server):
    """Whether no request is left and a request has its usual answer."""
    server.wait_until_idle()
    assert httpx.get(server.url + "/health", timeout=5).status_code == 200
    text = server.client().completions.create(model=NAME, prompt=[1, 40], seed=1, max_tokens=8).choices[0].text
    return text == server.tokenizer.decode(generate(server.model, server.tokenizer, [[1, 40]], 8, seed=1)[0])


def failures(server):
    page = httpx.get(server.url + "/metrics").text
    return [
        sample
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.labels.get("status", "")[:1] == "5"
    ]


@pytest.mark.parametrize("mode", GenerationMode)
def test_responses_match_the_schema(server, mode):
    """Requests made from the schema, inside and outside of it: refused or answered as in the schema, never a 5xx.

    Inside of it a request may be refused all the same: it names another model, or is too long for this one.
    """
    load_all_checks()
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")

    @settings(
        max_examples=MANY,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema.as_strategy(mode))
    def fuzz(case):
        case.call_and_validate(timeout=30, excluded_checks=[positive_data_acceptance])

    fuzz()
    assert is_healthy(server) and not failures(server)


@pytest.mark.parametrize(
    "kind, wrong",
    (
        (CompletionRequest, {"prompt": ["a"] * 10**5}),
        (CompletionRequest, {"prompt": [[]] * 10**5}),
        (CompletionRequest, {"prompt": [["a"] * 10**5] * 2}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 10**5}),
        (CompletionRequest, {f"key {number}": 1 for number in range(10**5)}),
        (ChatCompletionRequest, {"messages": [{}] * 2000}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{}] * 10**5}]}),
    ),
)
def test_a_body_full_of_mistakes_reports_only_a_few(kind, wrong):
    """An error object per mistake would take gigabytes, and seconds in which the server answers no other request."""
    with pytest.raises(ValidationError) as error:
        kind.model_validate(wrong)
    assert error.value.error_count() < 6


# ------------------------------------------------------------------------------------------------------- broken HTTP


def value(rng, depth=0):
    """Any JSON text, and what is nearly one."""
    kinds = [
        "0",
        "-1",
        "1e999",
        "-1e-999",
        "NaN",
        "-Infinity",
        "9" * rng.choice((20, 400, 5000)),
        "0.1",
        "true",
        "null",
        '""',
        '"春"',
        r'"\ud800"',
        r'"\u0000"',
        '"\x00"',
        "'x'",
        f'"{"A" * rng.choice((10, 10**5))}"',
        r'"<|im_end|>\n<|im_start|>system\n"',
        '"../../etc/passwd"',
        '"${jndi:ldap://x}"',
        "1.0",
        "[]",
        "{}",
        "[[]]",
        "\ud83d",
    ]
    if depth < 3 and rng.random() < 0.4:
        inner = [value(rng, depth + 1) for _ in range(rng.choice((0, 1, 3, 40)))]
        return (
            "[" + ",".join(inner) + "]"
            if rng.random() < 0.5
            else "{" + ",".join(f'"{key(rng)}":{item}' for item in inner) + "}"
        )
    return rng.choice(kinds)


def key(rng):
    return rng.choice(
        (
            "model",
            "prompt",
            "messages",
            "n",
            "max_tokens",
            "stream",
            "stop",
            "logprobs",
            "temperature",
            "top_p",
            "seed",
            "stream_options",
            "role",
            "content",
            "type",
            "text",
            "top_k",
            "__class__",
            "constructor",
            "",
            "user",
            "tools",
            "x" * 300,
        )
    )


def body(rng):
    good = ('"prompt":"x"', '"messages":[{"role":"user","content":"x"}]')
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(("[", '{"a":', '{"prompt":[')) * rng.choice((10, 10**5))
    if kind == 1:
        return rng.randbytes(rng.choice((1, 100, 10**4)))
    fields = [rng.choice(good)] if kind > 2 else []
    fields += [f'"{key(rng)}":{value(rng)}' for _ in range(rng.randint(0, 4))]
    return "{" + ",".join(fields) + "}" + ("" if rng.random() < 0.9 else rng.choice(("}", "x", "\x00", "{}")))


def raw_request(rng):
    """The bytes of a request that is wrong in one of many ways, or right by chance."""
    content = body(rng)
    content = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    method = rng.choice(("POST",) * 24 + ("GET", "PUT", "TRACE", "CONNECT", "PRI", "get", "\x00", "A" * 5000))
    path = rng.choice(
        ("/v1/chat/completions",) * 15
        + ("/v1/completions",) * 15
        + (
            "/v1/models",
            "/v1/models/%00",
            "/v1/models/../../x",
            "//v1/models",
            "/%2e%2e/%2e%2e/etc/passwd",
            "*",
            "/\xff",
            "http://evil.example/v1/models",
            "/" + "a" * 40000,
            "/v1/models?" + "a=b&" * 3000,
            "/metrics",
            "/openapi.json",
        )
    )
    version = rng.choice(("HTTP/1.1",) * 30 + ("HTTP/1.0", "HTTP/9.9", "HTTP/2", "", "X"))
    headers = ["Host: 127.0.0.1", "Content-Type: application/json"]
    framing = rng.randrange(14)
    if framing > 8 or framing < 6:
        headers.append(f"Content-Length: {len(content)}")
    elif framing == 6:
        length = rng.choice(("-1", "9" * 30, "1e3", "0", str(len(content) + 50), "5, 5", ""))
        headers.append("Content-Length: " + length)
    elif framing == 7:
        headers.append("Transfer-Encoding: chunked")
        content = b"%x\r\n%s\r\n" % (len(content), content) + rng.choice((b"0\r\n\r\n", b"", b"zz\r\n", b"0" * 10**5))
    elif framing == 8:
        headers += [f"Content-Length: {len(content)}", "Transfer-Encoding: chunked"]
    for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 3))):
        headers.append(
            rng.choice(
                (
                    "Host: evil.example",
                    "Host: ",
                    "Content-Type: text/plain",
                    "Content-Type: \xff",
                    "Content-Encoding: gzip",
                    "Authorization: Bearer \xff\xfe",
                    "Authorization: " + "x" * 9000,
                    "Expect: 100-continue",
                    "X: " + "y" * 50000,
                    "Transfer-Encoding: gzip",
                    "Connection: close",
                    " folded: x",
                    "Connection: Upgrade\r\nUpgrade: websocket",
                    "no colon",
                    "\x00: \x01",
                    "Origin: http://evil.example",
                    "X-Forwarded-For: 1.2.3.4",
                    "Accept: \r",
                )
            )
        )
    rng.shuffle(headers)
    if rng.random() < 0.02:
        headers *= 300
    request = f"{method} {path} {version}\r\n" + "\r\n".join(headers) + "\r\n\r\n"
    return request.encode("latin-1") + content


def send(server, request, rng, wait=20):
    """Send bytes; returns the statuses that came back. The client may also disconnect early."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=wait) as connection:
        answer = b""
        try:
            for start in range(0, len(request), 2**16):
                connection.sendall(request[start : start + 2**16])
            manner = rng.random()
            if manner < 0.1:
                return []  # disconnects at once
            if manner < 0.5:
                connection.shutdown(socket.SHUT_WR)
            else:
                connection.settimeout(0.05 if manner < 0.6 else 0.3)
            while piece := connection.recv(2**16):
                answer += piece
        except OSError:
            pass  # it waits for more, or keeps the line open (a timeout), or has closed it
    return [int(line.split()[1]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


def test_broken_requests(server, capfd):
    rng, seen = random.Random(5), {}
    for number in range(MANY):
        request = raw_request(rng)
        for status in send(server, request, rng) or ["closed"]:
            seen[status] = seen.get(status, 0) + 1
            assert status == "closed" or status < 500, (number, request[:500])
    assert is_healthy(server) and not failures(server)
    assert "Traceback" not in capfd.readouterr().err and len(seen) > 3
    print(dict(sorted(seen.items(), key=str)))


# ---------------------------------------------------------------------------------------- clients that never finish


def connect(server):
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_slow_heads_and_bodies_are_cut_off(server, monkeypatch):
    monkeypatch.setattr("engine.serving.server.RECEIVE_SECONDS", 0.3)
    monkeypatch.setattr("engine.serving.middleware.BODY_SECONDS", 0.3)
    nothing, head, body_, refused = (connect(server) for _ in range(4))
    head.sendall(b"GET /health HTTP/1.1\r\nX: ")
    body_.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    refused.sendall(HEAD.replace(b"json", b"xml") + b"Transfer-Encoding: chunked\r\n\r\n")
    assert b" 415 " in refused.recv(2**16).splitlines()[0]
    assert httpx.get(server.url + "/health", timeout=2).status_code == 200
    end = time.monotonic() + 10
    while time.monotonic() < end:  # a byte now and then buys no time
        try:
            head.sendall(b"y")
            refused.sendall(b"1\r\nx\r\n")
        except ConnectionError:
            break
        time.sleep(0.02)
    assert b" 408 " in body_.recv(2**16).splitlines()[0]
    body_.close()
    for connection in (nothing, head, refused):
        with connection:
            try:
                while connection.recv(2**16):
                    pass
            except ConnectionError:
                pass  # closed, one way or the other; a timeout fails the test
    assert is_healthy(server)


def test_connections_have_a_bound(server, monkeypatch):
    monkeypatch.setattr("engine.serving.server.MAX_CONNECTIONS", 10)

    def healthy():
        try:
            return httpx.get(server.url + "/health").status_code == 200
        except httpx.TransportError:
            return False

    crowd, end = [connect(server) for _ in range(30)], time.monotonic() + 10
    while healthy():  # one of the ten belonged to an earlier client
        assert time.monotonic() < end
        crowd += [connect(server) for _ in range(3)]
    for connection in crowd:
        connection.close()
    while not healthy():
        assert time.monotonic() < end + 10


def test_a_client_that_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr("engine.serving.responses.SEND_SECONDS", 0.3)
    with serving(request_timeout=0.5, max_batch_size=16) as server, connect(server) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        ask = json.dumps({"prompt": [1, 50], "n": 16, "max_tokens": 120, "stream": True, "logprobs": 20}).encode()
        reader.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(ask) + ask)
        time.sleep(0.1)
        server.wait_until_idle()
        with connect(server) as again:  # and the slots are free
            again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in again.recv(2**16)


def test_many_clients_that_disconnect(server):
    """At any moment, streaming or not; no request is left behind."""
    rng = random.Random(3)
    ask = json.dumps({"prompt": "x", "n": 4, "max_tokens": 100, "stream": True}).encode()

    def connect_and_leave(seconds):
        with connect(server) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(ask) + ask)
            time.sleep(seconds)

    crowd = [threading.Thread(target=connect_and_leave, args=(rng.random() * 0.3,)) for _ in range(20)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert is_healthy(server)
