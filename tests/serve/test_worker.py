"""The engine's thread when something breaks."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from decoder_cases import make_model, tnl_config
from torch import Tensor

from transnormer.data import ByteTokenizer
from transnormer.infer.engine import Engine
from transnormer.infer.engine_config import EngineConfig, QueueFull
from transnormer.infer.sampling import SamplingConfig
from transnormer.models.decoder import Decoder
from transnormer.serve.answer import Answer, Ask, Delta, Mailbox
from transnormer.serve.worker import Worker

TOKENS = 6


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A small model for bytes."""
    return make_model(tnl_config(vocab_size=259))


def answer_to(text: str) -> Answer:
    """A greedy answer of a few tokens."""
    ask = Ask(
        ids=torch.tensor(list(text.encode())),
        text=text,
        from_start=False,
        max_new_tokens=TOKENS,
        sampling=SamplingConfig(temperature=0.0),
        seed=None,
        stop=(),
        ends=(),
        logprobs=None,
        echo=False,
        state=None,
        keep_state=False,
    )
    return Answer(ask, ByteTokenizer(), 0, Mailbox(1000))


async def finished(answer: Answer) -> Delta:
    """All of an answer."""
    whole = Delta()
    while whole.finish_reason is None:
        whole.add((await asyncio.wait_for(answer.mailbox.get(), 20))[0])
    return whole


def serve(
    model: Decoder, texts: Sequence[str], break_it: Callable[[Worker, list[Answer]], None]
) -> list[Delta]:
    """Answers to texts that come together, then one to "after", of a worker that is broken."""

    async def run() -> list[Delta]:
        worker = Worker(Engine(model, EngineConfig(slots=4, batch_invariant=True)))
        answers = [answer_to(text) for text in texts]
        break_it(worker, answers)
        worker.submit(answers)
        worker.start(asyncio.get_running_loop())
        done = [await finished(answer) for answer in answers]
        after = answer_to("after")
        worker.submit([after])
        done.append(await finished(after))
        assert worker.open == 0
        worker.stop(10)
        assert not worker.alive
        return done

    return asyncio.run(run())


def nothing(worker: Worker, answers: list[Answer]) -> None:
    """Break nothing."""


def test_an_answer_that_cannot_be_written_ends_alone(model: Decoder) -> None:
    def break_it(worker: Worker, answers: list[Answer]) -> None:
        def collect(request: Any) -> Delta | None:
            raise KeyError("no such token")

        answers[1].collect = collect

    whole = serve(model, ["one", "two", "three"], nothing)
    broken = serve(model, ["one", "two", "three"], break_it)
    assert isinstance(broken[1].error, KeyError)
    assert broken[:1] + broken[2:] == whole[:1] + whole[2:]


def test_a_step_that_fails_ends_what_runs_and_nothing_after(model: Decoder) -> None:
    def break_it(worker: Worker, answers: list[Answer]) -> None:
        pool, decode, calls = worker.engine.pool, worker.engine.pool.decode, [0]

        def failing(ids: Tensor, slots: Sequence[int], rows: int) -> Tensor:
            calls[0] += 1
            if calls[0] == 3:
                raise RuntimeError("out of memory")
            return decode(ids, slots, rows)

        pool.decode = failing

    whole = serve(model, ["one", "two"], nothing)
    broken = serve(model, ["one", "two"], break_it)
    assert [delta.finish_reason for delta in broken] == ["error", "error", "length"]
    assert all("out of memory" in str(delta.error) for delta in broken[:2])
    assert broken[2] == whole[2]


def test_requests_that_do_not_fit_together_are_not_taken_at_all(model: Decoder) -> None:
    async def run() -> None:
        engine = Engine(model, EngineConfig(slots=1, queue=1))
        worker = Worker(engine)
        with pytest.raises(QueueFull):
            worker.submit([answer_to(text) for text in ("a", "b", "c")])
        assert worker.open == 0
        worker.start(asyncio.get_running_loop())
        after = answer_to("after")
        while engine.waiting:
            await asyncio.sleep(0.01)
        worker.submit([after])
        assert (await finished(after)).count == TOKENS
        worker.stop(10)
        counts = engine.metrics()
        assert counts.finished["cancelled"] == 2
        assert counts.generated_tokens == TOKENS

    asyncio.run(run())


def test_no_answer_is_lost_however_quickly_it_ends(model: Decoder) -> None:
    async def run() -> None:
        worker = Worker(Engine(model, EngineConfig(slots=4, queue=1000)))
        worker.start(asyncio.get_running_loop())
        answers = []
        for i in range(60):
            answers.append(answer_to(f"text {i}"))
            worker.submit(answers[-1:])
            # Now and then the engine runs dry, and sleeps.
            await asyncio.sleep(0.002 * (i % 20 == 0))
        counts = [(await finished(answer)).count for answer in answers]
        assert counts == [TOKENS] * 60
        worker.stop(10)
        assert "engine" not in [thread.name for thread in threading.enumerate()]

    asyncio.run(run())
