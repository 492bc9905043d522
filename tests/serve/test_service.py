"""A service in this process: long prompts are read beside the event loop, and runs that are hurried."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest
from decoder_cases import make_model, tnl_config
from fastapi import FastAPI

from transnormer.data import ByteTokenizer
from transnormer.infer.engine_config import EngineConfig
from transnormer.infer.request import Request
from transnormer.infer.text import begin_id
from transnormer.serve.answer import Answer
from transnormer.serve.errors import ApiError
from transnormer.serve.runs import Run
from transnormer.serve.schema import CompletionRequest
from transnormer.serve.serve_config import ServeConfig
from transnormer.serve.server import build, find_template
from transnormer.serve.service import Service

# More than a service reads at once.
MANY = 12


class Gate:
    """Holds the threads that come, and counts them."""

    def __init__(self) -> None:
        self.open, self._lock = threading.Event(), threading.Lock()
        self.inside = self.most = 0

    def hold(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The work, begun when the gate opens."""

        def held(*args: Any, **options: Any) -> Any:
            with self._lock:
                self.inside += 1
                self.most = max(self.most, self.inside)
            # Never for ever: a loop that is held itself could not open it.
            came = self.open.wait(10)
            with self._lock:
                self.inside -= 1
            assert came
            return work(*args, **options)

        return held


@pytest.fixture
def app() -> FastAPI:
    """The application around a small model for bytes."""
    tokenizer = ByteTokenizer()
    return build(
        make_model(tnl_config(vocab_size=259)),
        tokenizer,
        name="toy",
        template=find_template(None, tokenizer),
        engine_config=EngineConfig(slots=2, queue=100),
        config=ServeConfig(),
    )


@pytest.fixture
def service(app: FastAPI) -> Service:
    """What answers behind it, whose engine does not run."""
    return app.state.service


def ask(app: FastAPI, talk: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Talk to the application without a socket."""

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await talk(client)

    asyncio.run(run())


@pytest.mark.parametrize("what", ["tokenizer", "engine"])
def test_others_are_answered_while_long_prompts_are_read(
    app: FastAPI, service: Service, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    gate = Gate()
    owner, name = {
        "tokenizer": (service.tokenizer, "encode"),
        "engine": (service.worker, "submit"),
    }[what]
    monkeypatch.setattr(owner, name, gate.hold(getattr(owner, name)))

    async def talk(client: httpx.AsyncClient) -> None:
        body = {"prompt": "long", "max_tokens": 1}
        asked = [
            asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(MANY)
        ]
        while not gate.most:
            await asyncio.sleep(0)
        for _ in range(100):
            assert (await client.get("/health")).json()["model"] == "toy"
        assert not gate.open.is_set()
        assert gate.inside == gate.most < MANY
        gate.open.set()
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    ask(app, talk)


def test_who_leaves_while_his_prompts_are_handed_over_leaves_nothing_behind(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, submit, taken = Gate(), service.worker.submit, []

    def told(answers: Sequence[Answer]) -> list[Request]:
        taken.append(submit(answers))
        return taken[0]

    monkeypatch.setattr(service.worker, "submit", gate.hold(told))

    async def run() -> None:
        asks = await service.completions(CompletionRequest(prompt="a", n=2))
        coming = asyncio.ensure_future(service.start("gone", asks))
        while not gate.inside:
            await asyncio.sleep(0)
        coming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await coming
        assert not service.end("gone")
        gate.open.set()
        async with asyncio.timeout(20):
            while not (taken and all(request.cancelled for request in taken[0])):
                await asyncio.sleep(0.001)

    asyncio.run(run())
    assert len(taken[0]) == 2


def test_ids_longer_than_a_block_come_whole(service: Service) -> None:
    prompt = [i % 250 for i in range(200_000)]
    (ask,) = asyncio.run(service.completions(CompletionRequest(prompt=prompt)))
    assert ask.ids.tolist() == prompt


def test_a_prompt_that_was_read_while_the_server_was_told_to_stop_is_not_begun(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = asyncio.run(service.completions(CompletionRequest(prompt="a")))
    monkeypatch.setattr(service, "stopping", True)
    with pytest.raises(ApiError, match="is stopping"):
        asyncio.run(service.start("late", asks))


def test_many_answers_share_the_ids_of_their_prompt(service: Service) -> None:
    body = CompletionRequest(prompt="a text", n=3)
    asks = asyncio.run(service.completions(body))
    assert [x.ids is asks[0].ids for x in asks] == [True] * 3
    begin = begin_id(service.model, service.tokenizer)
    assert asks[0].ids.tolist() == [begin, *service.tokenizer.encode("a text")]


def test_a_run_whose_time_ends_as_it_is_hurried_says_so(service: Service) -> None:
    async def run() -> None:
        (ask,) = await service.completions(CompletionRequest(prompt="a"))
        waiting = Run(service, "late", [ask])
        waiting.hurry(-1.0)
        news = asyncio.ensure_future(anext(waiting.news()))
        # It begins to wait, then its time is over; it has not been told yet.
        for _ in range(2):
            await asyncio.sleep(0)
        waiting.hurry(1.0)
        with pytest.raises(ApiError, match="no answer within"):
            await news

    asyncio.run(run())
