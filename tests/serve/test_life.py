"""Keys, limits, readers who leave or dawdle, and the end of the server."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from openai import AuthenticationError, OpenAI, RateLimitError
from serve_cases import Server, Start

pytestmark = pytest.mark.timeout(300)

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "long", "max_tokens": 2000, "stream": True, "logit_bias": {"258": -100}}


def eventually(claim: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.02)


def running(client: httpx.Client) -> int:
    """Requests in the engine."""
    health = client.get("/health").json()
    return health["running"] + health["waiting"]


def first_text(lines: Iterator[str]) -> Any:
    """The first chunk of a stream that has text; what follows stays to be read."""
    for line in lines:
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            if chunk["choices"][0]["text"]:
                return chunk
    raise AssertionError("the stream ended")


def test_a_reader_who_leaves_frees_the_engine(plain: httpx.Client) -> None:
    with plain.stream("POST", COMPLETIONS, json=LONG) as response:
        lines = response.iter_lines()
        first_text(lines)
        assert running(plain) == 1
    eventually(lambda: running(plain) == 0)


def test_who_leaves_before_the_whole_answer_frees_the_engine(plain: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        plain.post(COMPLETIONS, json=LONG | {"stream": False}, timeout=0.3)
    eventually(lambda: running(plain) == 0)


def test_a_client_ends_its_stream_and_keeps_the_state(plain: httpx.Client) -> None:
    with plain.stream("POST", COMPLETIONS, json=LONG | {"keep_state": True}) as response:
        coming = response.iter_lines()
        name = first_text(coming)["id"]
        assert plain.post(f"/v1/requests/{name}/end").json()["ended"]
        lines = [line for line in coming if line]
    assert lines[-1] == "data: [DONE]"
    last = json.loads(lines[-2][6:])
    assert last["choices"][0]["finish_reason"] == "stop"
    assert 5 < last["state"]["tokens"] < 2000


@pytest.mark.slow
def test_a_key_is_asked_for_everywhere_but_at_the_door(start: Start, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret-key\n")
    server = start(f"--api-key-file={tmp_path / 'key'}", "--cors-origin=http://mine.example")
    with server.client() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 401
            key = {"Authorization": "Bearer secret-key"}
            assert client.get(path, headers=key).status_code == 200
        # A page of another origin asks first, without the key.
        ask = {"Origin": "http://mine.example", "Access-Control-Request-Method": "POST"}
        assert client.options(COMPLETIONS, headers=ask).status_code == 200
        other = client.options(COMPLETIONS, headers=ask | {"Origin": "http://other.example"})
        assert "access-control-allow-origin" not in other.headers
    with pytest.raises(AuthenticationError):
        server.openai("wrong").models.list()
    assert server.openai("secret-key").models.list().data
    assert "secret-key" not in "".join(server.lines)


def test_no_origin_is_allowed_by_default(plain: httpx.Client) -> None:
    response = plain.get("/v1/models", headers={"Origin": "http://other.example"})
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.slow
def test_a_full_queue_and_a_late_answer_have_their_own_errors(start: Start) -> None:
    server = start("--slots=1", "--queue=1", "--request-seconds=2", "--max-new-tokens=1000000")
    judge: OpenAI = server.openai()
    asked: dict[str, Any] = {"model": "toy", "prompt": "a", "logit_bias": {"258": -100}}
    endless = asked | {"max_tokens": 1_000_000, "stream": True}
    with server.client() as client:
        first = judge.completions.create(**endless)
        eventually(lambda: client.get("/health").json()["running"] == 1)
        second = judge.completions.create(**endless)
        with pytest.raises(RateLimitError) as refused:
            judge.completions.create(**asked, max_tokens=1)
        assert refused.value.code == "queue_full"
        assert refused.value.response.headers["retry-after"] == "1"
        with pytest.raises(RateLimitError):
            judge.completions.create(**endless)
        # Two prompts where there is room for none: neither is taken.
        with pytest.raises(RateLimitError):
            judge.completions.create(**asked | {"prompt": ["a", "b"]}, max_tokens=1)
        for stream in (first, second):
            with pytest.raises(Exception, match="within 2 seconds"):
                list(stream)
        eventually(lambda: running(client) == 0)
        late = client.post(COMPLETIONS, json=asked | {"max_tokens": 1_000_000})
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        assert judge.completions.create(**asked, max_tokens=3).usage is not None


def send(server: Server, body: dict[str, Any], receive_buffer: int) -> socket.socket:
    """A connection that has sent a request and reads nothing."""
    address = urlsplit(server.url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    assert address.hostname is not None
    connection.connect((address.hostname, address.port))
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.slow
def test_a_reader_who_takes_nothing_loses_his_stream_and_nobody_waits(start: Start) -> None:
    server = start("--max-new-tokens=1000000", "--slots=17", "--batch-invariant")
    # So much a step that the buffers of both sides are soon full.
    body = LONG | {"max_tokens": 1_000_000, "logprobs": 20, "n": 16}
    asked = {"prompt": "quick", "max_tokens": 20, "seed": 1}
    with server.client() as client:
        alone = client.post(COMPLETIONS, json=asked).json()["choices"]
        with send(server, body, 4096):
            eventually(lambda: running(client) == 16)
            began = time.monotonic()
            while running(client):
                assert client.post(COMPLETIONS, json=asked).json()["choices"] == alone
                assert time.monotonic() - began < 250


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_a_stream_ends_whole_when_the_server_is_told_to_stop(
    start: Start, number: signal.Signals, code: int
) -> None:
    server = start("--slots=2")
    with (
        server.client() as client,
        client.stream("POST", COMPLETIONS, json=LONG | {"max_tokens": 300}) as response,
    ):
        coming = response.iter_lines()
        first_text(coming)
        server.process.send_signal(number)
        lines = [line for line in coming if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
    server.process.wait(30)
    assert server.stop() == code


def test_a_port_in_use_is_one_clear_line(server: Server, toy: Path) -> None:
    port = str(urlsplit(server.url).port)
    command = [sys.executable, "-m", "transnormer", "serve", str(toy), "--port", port]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: 127.0.0.1:{port}: Address already in use")
    assert run.stderr.count("\n") == 1
