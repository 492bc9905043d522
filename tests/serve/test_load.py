"""Many clients at once, and one that sends everything that the description allows and forbids."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_cases import Server, Start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLIENTS = 500
COMPLETIONS = "/v1/completions"


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, str | None]:
    """The text of a stream and its finish reason, from chunks of one id and one end."""
    text, reasons, ends = "", [], 0
    async with client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ends += 1
            elif line.startswith("data: "):
                (choice,) = json.loads(line[6:])["choices"]
                text += choice["text"]
                reasons.append(choice["finish_reason"])
    assert ends == 1
    assert [reason for reason in reasons if reason] == reasons[-1:]
    return text, reasons[-1]


def bodies(count: int) -> list[dict[str, Any]]:
    """Requests that differ in prompt, length and seed."""
    return [
        {"prompt": f"client {i % 50}", "max_tokens": 1 + i % 13, "seed": i % 50}
        for i in range(count)
    ]


async def together(server: Server, asked: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """The answers of as many clients, each with a connection of its own."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=server.url, trust_env=False, timeout=500, limits=limits
    ) as client:
        return await asyncio.gather(*(streamed(client, body) for body in asked))


def test_five_hundred_clients_get_what_each_gets_alone(server: Server) -> None:
    asked = bodies(CLIENTS)
    with server.client() as client:
        alone = {}
        for body in asked:
            key = json.dumps(body)
            if key not in alone:
                choice = client.post(COMPLETIONS, json=body).json()["choices"][0]
                alone[key] = (choice["text"], choice["finish_reason"])
    got = asyncio.run(together(server, asked))
    assert got == [alone[json.dumps(body)] for body in asked]
    with server.client() as client:
        health = client.get("/health").json()
    assert (health["running"], health["waiting"]) == (0, 0)


def test_every_request_of_the_description_has_an_answer_of_the_description(
    start: Start, tmp_path: Path
) -> None:
    server = start("--max-new-tokens=20")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    # What the description cannot say (fields that belong together, names of states) is refused.
    options = ["--exclude-checks=positive_data_acceptance", "--max-examples=15", "--seed=1"]
    run = subprocess.run(
        [*command, *options, "--request-timeout=30", "--no-color"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "Traceback" not in "".join(server.lines)
