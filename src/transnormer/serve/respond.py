"""Answers on their way out: whole, or as a stream that ends when its reader leaves."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import closing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.types import Receive, Scope, Send

from transnormer.infer.engine_config import QueueFull
from transnormer.serve.answer import Ask, Delta
from transnormer.serve.errors import as_api_error
from transnormer.serve.forms import Form
from transnormer.serve.replies import usage
from transnormer.serve.runs import Run
from transnormer.serve.schema import Sampled, StreamOptions
from transnormer.serve.service import Service

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
# nginx's number for a reader who left; nobody sees it but the metrics.
CLIENT_GONE = 499
_PING_SECONDS = 15


class ClientGone(Exception):
    """The reader of an answer has left."""


async def respond(
    request: Request, service: Service, body: Sampled, asked: Awaitable[list[Ask]], form: Form
) -> Response:
    """The answer to a request.

    Args:
        request: who asks, and may leave.
        service: what answers.
        body: what was sent.
        asked: what it asks, found out here.
        form: how the answer is written.

    Raises:
        ApiError: what is wrong with the request, or what it ended with.
    """
    try:
        asks = await asked
        if body.stream:
            return await _stream(service, body, asks, form)
        content = await _while_connected(request, _whole(service, body, asks, form))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    except (ValueError, TypeError, NotImplementedError, QueueFull) as error:
        raise as_api_error(error) from error
    return JSONResponse(content)


async def _while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of some work, which ends where the reader leaves before it does.

    Raises:
        ClientGone: the reader has left.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for other in (task, watch):
            other.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(
    service: Service, body: Sampled, asks: Sequence[Ask], form: Form
) -> dict[str, Any]:
    answers = [Delta() for _ in asks]
    with closing(await service.start(form.id, asks)) as run:
        async for index, delta in run.news():
            answers[index].add(delta)
    content = form.head(chunk=False) | {
        "choices": [form.choice(i, answer, chunk=False) for i, answer in enumerate(answers)],
        "usage": _usage(service, body, asks, answers),
    }
    kept = service.keep(answers[0])
    return content if kept is None else content | {"state": kept.model_dump()}


def _usage(
    service: Service, body: Sampled, asks: Sequence[Ask], answers: Sequence[Delta]
) -> dict[str, Any]:
    count = sum(answer.count for answer in answers)
    cached = sum(answer.cached for answer in answers[:: body.n])
    return usage(service.prompt_tokens(asks, body.n), count, cached)


async def _stream(service: Service, body: Sampled, asks: Sequence[Ask], form: Form) -> "_Stream":
    # Started before the first byte is sent, so that a full queue still has its own status.
    run = await service.start(form.id, asks)

    async def events() -> AsyncIterator[bytes]:
        try:
            async for chunk in _chunks(service, body, asks, form, run):
                yield _event(chunk)
        except Exception as error:
            yield _event(as_api_error(error).body())
        else:
            yield b"data: [DONE]\n\n"

    return _Stream(service, run, events())


class _Stream(EventSourceResponse):
    """Server-sent events of a run, which is closed with them however they end."""

    def __init__(self, service: Service, run: Run, events: AsyncIterator[bytes]) -> None:
        super().__init__(
            events,
            ping=_PING_SECONDS,
            sep="\n",
            send_timeout=service.config.send_seconds,
            # Runs end by themselves within the drain; the second is for their last words.
            shutdown_grace_period=service.config.drain_seconds + 1,
        )
        self._service, self._run = service, run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.metrics.streams.inc()
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("a reader took nothing for %g s", self._service.config.send_seconds)
        finally:
            self._run.close()
            self._service.metrics.streams.dec()


async def _chunks(
    service: Service, body: Sampled, asks: Sequence[Ask], form: Form, run: Run
) -> AsyncIterator[dict[str, Any]]:
    """Every chunk of a stream."""
    head = form.head(chunk=True)
    options = body.stream_options or StreamOptions()
    answers = [Delta() for _ in asks]

    def counts() -> dict[str, Any]:
        if not (options.include_usage or options.continuous_usage_stats):
            return {}
        # OpenAI's streams say null in every chunk but the last.
        so_far = _usage(service, body, asks, answers) if options.continuous_usage_stats else None
        return {"usage": so_far}

    for index in range(len(asks)):
        opening = form.opening(index)
        if opening is not None:
            yield head | {"choices": [opening]} | counts()
    async for index, delta in run.news():
        answers[index].count += delta.count
        answers[index].cached = delta.cached
        if delta.text or delta.tokens or delta.finish_reason is not None:
            chunk = head | {"choices": [form.choice(index, delta, chunk=True)]} | counts()
            kept = service.keep(delta)
            yield chunk if kept is None else chunk | {"state": kept.model_dump()}
    if options.include_usage:
        yield head | {"choices": [], "usage": _usage(service, body, asks, answers)}


def _event(data: dict[str, Any]) -> bytes:
    """One event; JSON in ASCII, so that no line end of the text can end it."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"
