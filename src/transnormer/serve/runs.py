"""The answers of one HTTP request while they come, in the time that they have."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from transnormer.infer.request import Request
from transnormer.serve.answer import Answer, Ask, Delta, Mailbox
from transnormer.serve.errors import ApiError, as_api_error

if TYPE_CHECKING:
    from transnormer.serve.service import Service


class Run:
    """The answers of one HTTP request while they come.

    Args:
        service: whose engine answers.
        name: id of the answer.
        asks: an entry an answer.

    Attributes:
        ended: its client has asked that it ends here.
    """

    def __init__(self, service: "Service", name: str, asks: Sequence[Ask]) -> None:
        self.ended = self._closed = False
        self._service, self._name = service, name
        self._deadline = asyncio.get_running_loop().time() + service.config.request_seconds
        self._timeout: asyncio.Timeout | None = None
        self._mailbox = Mailbox(service.config.stream_tokens)
        self._answers = [
            Answer(ask, service.tokenizer, index, self._mailbox) for index, ask in enumerate(asks)
        ]
        self._began = time.perf_counter()
        self._requests: list[Request] = []
        self._open = set(range(len(asks)))

    def submit(self) -> None:
        """Give the engine all requests, or none; from any thread."""
        self._requests = self._service.worker.submit(self._answers)
        if self._closed:
            self.cancel()

    def cancel(self) -> None:
        """End all that has not ended."""
        for request in self._requests:
            if not request.finished:
                request.cancel()

    def hurry(self, seconds: float) -> None:
        """Leave so much time from now on, if there was more."""
        self._deadline = min(self._deadline, asyncio.get_running_loop().time() + seconds)
        # One that has expired cannot be set again before its waiter has been told.
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(self._deadline)

    def close(self) -> None:
        """Cancel, and let go of the id."""
        self._closed = True
        self._service.forget(self._name)
        self.cancel()

    async def news(self) -> AsyncIterator[tuple[int, Delta]]:
        """Each answer's news as they come, to the end of the last.

        Raises:
            ApiError: the time is over, or an answer ended with an error.
        """
        first = True
        while self._open:
            news = await self._next()
            if first:
                self._service.metrics.first_token.observe(time.perf_counter() - self._began)
                first = False
            for index, delta in sorted(news.items()):
                self._check(delta)
                if delta.finish_reason is not None:
                    self._open.discard(index)
                yield index, delta

    async def _next(self) -> dict[int, Delta]:
        """What comes next."""
        try:
            async with asyncio.timeout_at(self._deadline) as self._timeout:
                return await self._mailbox.get()
        except TimeoutError:
            if self._service.stopping:
                raise ApiError(503, "the server is stopping", code="stopping") from None
            raise ApiError(
                504,
                f"no answer within {self._service.config.request_seconds:g} seconds; expected "
                "fewer tokens or less load",
                code="timeout",
            ) from None
        finally:
            self._timeout = None

    def _check(self, delta: Delta) -> None:
        if delta.error is not None:
            raise as_api_error(delta.error) from delta.error
        if delta.finish_reason != "cancelled":
            return
        if not self.ended:
            raise ApiError(
                503,
                "the request was ended: its reader is slower than "
                f"{self._service.config.stream_tokens} tokens, or the server is stopping",
                code="cancelled",
            )
        delta.finish_reason = "stop"
