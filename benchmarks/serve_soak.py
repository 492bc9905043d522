"""Claim: the server loses and doubles nothing, and its memory stays flat, whatever clients do.

Starts `transnormer serve` with a small model of random weights on a free loopback port, asks it a set
of requests one by one, and then sends the same requests from many clients at once for some minutes,
mixed with others: readers who leave in the middle of a stream or before an answer, malformed and
poisoned requests, conversations that are kept, continued and forgotten. Every answer is compared
with the one that the request got alone, and the process is watched. Prints a table; the last line is
JSON, which also goes to benchmarks/results/serve_soak.json. Needs Linux (/proc), and `pip install
'transnormer[serve]' httpx`.

    python benchmarks/serve_soak.py
    python benchmarks/serve_soak.py --minutes 0.2 --clients 8 --output soak.json
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import harness
import httpx
import torch

from transnormer.data import ByteTokenizer
from transnormer.models import checkpoint, zoo
from transnormer.models.decoder import Decoder

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
Body = dict[str, Any]
# How often each kind of client comes, of 100.
SHARES = {
    "stream": 40,
    "whole": 15,
    "chat stream": 15,
    "conversation": 8,
    "leaves a stream": 8,
    "leaves before the answer": 4,
    "malformed": 6,
    "poisoned": 4,
}
MALFORMED = (
    (b"{", 400),
    (b'{"prompt": []}', 400),
    (b'{"prompt": [99999]}', 400),
    (b'{"prompt": "a", "max_tokens": 1000000000}', 400),
    (b'{"prompt": "a", "logit_bias": {"1": NaN}}', 400),
    (b'{"prompt": "a", "model": "another"}', 404),
    (b'{"prompt": "' + b"a" * 2_000_000 + b'"}', 413),
)
# Divides by so little that no logit stays finite: fails within the engine, by itself.
POISON = {"prompt": "poison", "max_tokens": 8, "repetition_penalty": 1e-40}


def make_model(folder: Path) -> None:
    """A small model for bytes."""
    torch.manual_seed(0)
    config = zoo.tnl_custom(vocab_size=259, model_dim=64, num_layers=2, heads=2, glu_dim=128)
    checkpoint.save(Decoder(config.model_copy(update={"init_std": 0.2})), folder)
    ByteTokenizer().save(folder)


def start(folder: Path, slots: int) -> tuple[subprocess.Popen[str], str]:
    """Serve the model; the process and its address."""
    options = ["--port=0", "--batch-invariant", f"--slots={slots}", "--max-body-mb=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "transnormer", "serve", str(folder), *options, "--states-mb=8"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    if found is None:
        raise RuntimeError("the server did not start; expected a line with its address")
    return process, found[0]


def wanted() -> list[tuple[str, Body]]:
    """The requests whose answers are known: both routes, greedy and drawn, of many lengths."""
    requests: list[tuple[str, Body]] = []
    for i in range(24):
        drawn = {
            "max_tokens": 1 + 5 * (i % 9),
            "seed": i,
            "temperature": 0.0 if i % 4 == 0 else 1.0,
        }
        requests.append((COMPLETIONS, drawn | {"prompt": f"text {i} " * (1 + 7 * (i % 5))}))
        said = [{"role": "user", "content": f"question {i}"}]
        requests.append((CHAT, drawn | {"messages": said}))
    return requests


class Soak:
    """Clients of one server, and what became of their requests.

    Args:
        client: of the server.
        seed: of what the clients do.
    """

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self.client, self.random = client, random.Random(seed)
        self.requests = wanted()
        self.known: list[str] = []
        self.done: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.examples: list[str] = []
        self.first: list[float] = []

    async def learn(self) -> None:
        """Ask everything once, one by one."""
        for route, body in self.requests:
            response = await self.client.post(route, json=body)
            response.raise_for_status()
            choice = response.json()["choices"][0]
            self.known.append(
                choice["text"] if route == COMPLETIONS else choice["message"]["content"]
            )

    def fail(self, kind: str, what: str) -> None:
        """Note that something is not as it must be."""
        self.wrong[kind] += 1
        self.examples = [*self.examples, f"{kind}: {what}"][:20]

    async def stream(self, route: str, body: Body, leave_after: int | None = None) -> str | None:
        """The text of a stream; None where it was left. A broken one is noted."""
        text, ends, began = "", 0, time.perf_counter()
        asked = body | {"stream": True}
        async with self.client.stream("POST", route, json=asked) as response:
            if response.status_code != 200:
                self.fail("status", str(response.status_code))
                return None
            pieces = 0
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ends += 1
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        self.fail("error in a stream", chunk["error"]["message"])
                        return None
                    choice = chunk["choices"][0]
                    piece = (
                        choice["text"] if route == COMPLETIONS else choice["delta"].get("content")
                    )
                    if piece and not text:
                        self.first.append(time.perf_counter() - began)
                    text += piece or ""
                    pieces += 1
                    if leave_after is not None and pieces > leave_after:
                        return None
        if ends != 1:
            self.fail("lost the end of a stream", str(ends))
        return text

    async def known_stream(self, routes: tuple[str, ...]) -> None:
        """A stream has the text that it had alone."""
        index = self.pick(routes)
        text = await self.stream(*self.requests[index])
        self.compare(index, text)

    def pick(self, routes: tuple[str, ...]) -> int:
        """One of the requests of some routes."""
        return self.random.choice([i for i, (r, _) in enumerate(self.requests) if r in routes])

    def compare(self, index: int, text: str | None) -> None:
        """Note an answer that is not the one that came alone."""
        if text is not None and text != self.known[index]:
            self.fail("another text", f"{text[:60]!r} for {self.known[index][:60]!r}")

    async def whole(self) -> None:
        """An answer in one piece."""
        index = self.pick((COMPLETIONS,))
        route, body = self.requests[index]
        response = await self.client.post(route, json=body)
        if response.status_code != 200:
            self.fail("status", str(response.status_code))
            return
        self.compare(index, response.json()["choices"][0]["text"])

    async def conversation(self) -> None:
        """Two branches from one kept state, which is then forgotten, agree with each other."""
        opening = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "seed": 1}
        response = await self.client.post(CHAT, json=opening | {"keep_state": True})
        state = response.json()["state"]["id"]
        asked = opening | {"state": state, "messages": [{"role": "user", "content": "more"}]}
        said = await asyncio.gather(*(self.stream(CHAT, asked) for _ in range(2)))
        if len(set(said)) != 1:
            self.fail("branches differ", str(said))
        if (await self.client.delete(f"/v1/states/{state}")).status_code != 200:
            self.fail("status", "a state was lost")

    async def leave_stream(self) -> None:
        """Go away in the middle of a long answer."""
        body = {"prompt": "long", "max_tokens": 400, "seed": 1}
        await self.stream(COMPLETIONS, body, leave_after=self.random.randrange(12))

    async def leave_whole(self) -> None:
        """Go away before the answer is there."""
        body = {"prompt": "long", "max_tokens": 400, "seed": 1}
        try:
            await self.client.post(COMPLETIONS, json=body, timeout=self.random.random() / 2)
        except httpx.TimeoutException:
            return

    async def malformed(self) -> None:
        """Send what is wrong, and be told so."""
        body, status = self.random.choice(MALFORMED)
        response = await self.client.post(
            COMPLETIONS, content=body, headers={"Content-Type": "application/json"}
        )
        if response.status_code != status:
            self.fail("status", f"{response.status_code} for {body[:40]!r}")

    async def poisoned(self) -> None:
        """Send what fails within the engine, and be told so."""
        response = await self.client.post(COMPLETIONS, json=POISON)
        if response.status_code != 400:
            self.fail("status", f"{response.status_code} for a poisoned request")

    async def work(self, until: float) -> None:
        """One client: a request after the other."""
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "stream": lambda: self.known_stream((COMPLETIONS,)),
            "whole": self.whole,
            "chat stream": lambda: self.known_stream((CHAT,)),
            "conversation": self.conversation,
            "leaves a stream": self.leave_stream,
            "leaves before the answer": self.leave_whole,
            "malformed": self.malformed,
            "poisoned": self.poisoned,
        }
        while time.monotonic() < until:
            kind = self.random.choices(list(SHARES), list(SHARES.values()))[0]
            try:
                await kinds[kind]()
            except httpx.HTTPError as error:
                self.fail("connection", f"{kind}: {error!r}")
            self.done[kind] += 1


def watch(process: int) -> dict[str, float]:
    """Memory, open files and threads of a process."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "rss_mb": int(fields["VmRSS"].split()[0]) / 1024,
        "files": len(list(Path(f"/proc/{process}/fd").iterdir())),
        "threads": int(fields["Threads"]),
    }


async def figures(client: httpx.AsyncClient) -> dict[str, float]:
    """What the server counts."""
    lines = (await client.get("/metrics")).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def soak(url: str, process: int, options: argparse.Namespace) -> dict[str, Any]:
    """All clients, for as long as was asked."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, trust_env=False, timeout=300, limits=limits
    ) as client:
        run = Soak(client, options.seed)
        await run.learn()
        before, began = await figures(client), time.monotonic()
        until = began + 60 * options.minutes
        tasks = [asyncio.create_task(run.work(until)) for _ in range(options.clients)]
        samples = []
        while not all(task.done() for task in tasks):
            samples.append({"seconds": time.monotonic() - began, **watch(process)})
            await asyncio.sleep(min(5.0, 6 * options.minutes))
        await asyncio.gather(*tasks)
        seconds = time.monotonic() - began
        # Readers who left are noticed within a step.
        for _ in range(100):
            health = (await client.get("/health")).json()
            if not health["running"] + health["waiting"]:
                break
            await asyncio.sleep(0.1)
        after = await figures(client)
        grown = {name: after[name] - before.get(name, 0.0) for name in after}
    return {
        "rows": [{"kind": kind, "requests": run.done[kind]} for kind in SHARES],
        "wrong": dict(run.wrong),
        "examples": run.examples,
        "samples": samples,
        "summary": {
            "minutes": round(seconds / 60, 2),
            "clients": options.clients,
            "requests": run.done.total(),
            "requests_per_second": round(run.done.total() / seconds, 1),
            "tokens_per_second": round(grown["transnormer_generated_tokens_total"] / seconds, 1),
            "wrong": run.wrong.total(),
            "left_running": health["running"] + health["waiting"],
            "first_text_ms_median": round(1000 * statistics.median(run.first)),
            "first_text_ms_p99": round(1000 * sorted(run.first)[len(run.first) * 99 // 100]),
            **memory(samples),
        },
    }


def memory(samples: list[dict[str, float]]) -> dict[str, float]:
    """Memory at the beginning and at the end of the second half, and its slope in between."""
    later = samples[len(samples) // 2 :]
    x, y = [s["seconds"] / 60 for s in later], [s["rss_mb"] for s in later]
    slope = statistics.linear_regression(x, y).slope if len(later) > 1 else 0.0
    return {
        "rss_mb_at_half_time": round(y[0], 1),
        "rss_mb_at_the_end": round(y[-1], 1),
        "rss_mb_per_minute": round(slope, 3),
        "most_files": max(s["files"] for s in samples),
        "most_threads": max(s["threads"] for s in samples),
    }


def main() -> None:
    """Soak and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "serve_soak.json")
    options = parser.parse_args()
    environment = harness.environment()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "toy")
        process, url = start(Path(folder) / "toy", options.slots)
        try:
            result = asyncio.run(soak(url, process.pid, options))
        finally:
            process.terminate()
            process.wait(30)
            assert process.stdout is not None
            process.stdout.close()
    environment["load_after"] = os.getloadavg()[0]
    harness.print_table(["kind", "requests"], [list(row.values()) for row in result["rows"]])
    harness.publish({"environment": environment, **result}, options.output)
    if result["summary"]["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
