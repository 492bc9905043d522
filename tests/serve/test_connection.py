"""Connections that end where no request comes, and those that stay."""

import asyncio
from typing import Any

import pytest
import uvicorn

from transnormer.serve.connection import closes_idle

HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"


async def slow(scope: Any, receive: Any, send: Any) -> None:
    """An application that takes longer than a client may be silent."""
    await asyncio.sleep(0.5)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


async def talk(*parts: bytes) -> bytes:
    """What a connection gives until it ends, to a client who sends these parts and then waits."""
    config = uvicorn.Config(
        slow, http=closes_idle(0.1), ws="none", lifespan="off", timeout_keep_alive=3600
    )
    config.load()
    protocol: Any = config.http_protocol_class
    state = uvicorn.Server(config).server_state
    server = await asyncio.get_running_loop().create_server(
        lambda: protocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    async with server:
        host, port = server.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(host, port)
        for part in parts:
            writer.write(part)
        found = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        await writer.wait_closed()
    assert not state.connections
    return found


@pytest.mark.parametrize("sent", [b"", HEAD], ids=["nothing", "half-a-head"])
def test_a_client_without_a_request_loses_the_connection(sent: bytes) -> None:
    assert asyncio.run(talk(sent)) == b""


@pytest.mark.parametrize("rest", [b"", HEAD], ids=["nothing", "half-a-head"])
def test_an_answer_comes_whole_however_long_it_takes_and_silence_after_it_ends(rest: bytes) -> None:
    found = asyncio.run(talk(HEAD + b"\r\n", rest))
    assert found.startswith(b"HTTP/1.1 200")
    assert b"done" in found
