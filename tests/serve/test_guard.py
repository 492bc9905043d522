"""The bounds of a request's time and size, without a socket."""

import asyncio
import json
from typing import Any

import pytest

from transnormer.serve.answer import Delta, Mailbox
from transnormer.serve.guard import Guard
from transnormer.serve.metrics import Metrics
from transnormer.serve.serve_config import ServeConfig

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/completions",
}


async def ask(
    parts: list[bytes | None], host: bytes = b"localhost", **options: Any
) -> tuple[int, Any]:
    """Status and body of a request whose body comes in parts; None never comes."""
    guard = Guard(echo, ServeConfig(**options), Metrics(), lambda path: 10)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        part = parts.pop(0)
        if part is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    await guard(SCOPE | {"headers": [(b"host", host)]}, receive, send)
    return sent[0]["status"], json.loads(b"".join(x.get("body", b"") for x in sent[1:]))


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that gives the body back."""
    message = await receive()
    assert not message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send(
        {"type": "http.response.body", "body": json.dumps(message["body"].decode()).encode()}
    )


def test_a_body_in_parts_comes_whole() -> None:
    assert asyncio.run(ask([b"12345", b"67890"])) == (200, "1234567890")


def test_a_body_that_never_comes_is_given_up() -> None:
    status, body = asyncio.run(ask([b"1", None], body_seconds=0.05))
    assert status == 408
    assert "did not arrive in 0.05 seconds" in body["error"]["message"]


def test_a_body_that_is_too_large_is_not_kept() -> None:
    status, body = asyncio.run(ask([b"12345", b"678901"]))
    assert status == 413
    assert body["error"]["code"] == "body_too_large"


def test_the_name_of_a_host_has_no_case() -> None:
    assert asyncio.run(ask([b"1"], host=b"LocalHost:8000"))[0] == 200
    assert asyncio.run(ask([b"1"], host=b"Proxy.example", hosts=("proxy.Example",)))[0] == 200
    assert asyncio.run(ask([b"1"], host=b"localhost.example"))[0] == 403


def test_a_late_reader_gets_everything_in_one_piece() -> None:
    async def late() -> dict[int, Delta]:
        box = Mailbox(10)
        assert box.put(0, Delta("ab", count=2))
        assert box.put(1, Delta("x", count=1))
        assert box.put(0, Delta("cd", count=2, finish_reason="stop"))
        return await box.get()

    news = asyncio.run(late())
    assert {index: delta.text for index, delta in news.items()} == {0: "abcd", 1: "x"}
    assert news[0].finish_reason == "stop"
    assert news[0].count == 4


def test_a_reader_who_is_too_late_is_known() -> None:
    async def full() -> list[bool]:
        box = Mailbox(3)
        room = [box.put(0, Delta("a", count=1)) for _ in range(4)]
        await box.get()
        return [*room, box.put(0, Delta("a", count=1))]

    assert asyncio.run(full()) == [True, True, True, False, True]


@pytest.mark.parametrize("key", ["", "schlüssel", "two\nlines"])
def test_a_key_that_no_header_can_hold_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="api_key is empty, not ASCII or several lines"):
        ServeConfig(api_key=key)
