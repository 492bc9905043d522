"""The one thread that steps the engine, and how its news reach the event loop."""

import asyncio
import logging
import threading
from collections.abc import Sequence

from transnormer.infer.engine import Engine
from transnormer.infer.request import Request
from transnormer.serve.answer import Answer, Delta

log = logging.getLogger(__name__)


class Worker:
    """Owns an engine: its thread alone steps it, and sleeps while there is nothing to do.

    Requests come from the event loop, news go back to it, a batch a step. Neither side ever waits
    for the other: the engine hands over and goes on, a reader who is late finds everything joined in
    his mailbox, and one who is too late loses his request.

    Args:
        engine: stepped by nobody else.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._active: list[tuple[Request, Answer]] = []
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to step; mailboxes are filled in this loop."""
        self._loop = loop
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """End after the step that runs, waiting for it so long at most."""
        self._stopping = True
        self._wake.set()
        self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def open(self) -> int:
        """Answers that are not finished."""
        return len(self._active)

    def submit(self, answers: Sequence[Answer]) -> list[Request]:
        """Give the engine the requests of answers, all or none.

        Raises:
            QueueFull: there is no room for all of them.
            ValueError, TypeError: what the engine refuses.
        """
        pairs: list[tuple[Request, Answer]] = []
        try:
            for answer in answers:
                pairs.append((self._submit(answer), answer))
        except Exception:
            for request, _ in pairs:
                request.cancel()
            self._wake.set()
            raise
        # What the engine has finished before this line is reported by its next step.
        with self._lock:
            self._active += pairs
        self._wake.set()
        return [request for request, _ in pairs]

    def _submit(self, answer: Answer) -> Request:
        ask = answer.ask
        return self.engine.submit(
            ask.ids,
            max_new_tokens=ask.max_new_tokens,
            sampling=ask.sampling,
            seed=ask.seed,
            stop=ask.ends,
            until=answer.until,
            logprobs=ask.logprobs,
            prompt_logprobs=ask.logprobs if ask.echo else None,
            state=ask.state,
            keep_state=ask.keep_state,
        )

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait()
            self._wake.clear()
            busy = True
            while busy and not self._stopping:
                try:
                    busy = self.engine.step()
                except Exception:
                    # The engine has ended what ran with an error; what waits is still served.
                    log.exception("a step of the engine failed")
                self._report()

    def _report(self) -> None:
        """Send the event loop what the last step brought."""
        with self._lock:
            active = list(self._active)
        news: list[tuple[Request, Answer, Delta]] = []
        for request, answer in active:
            try:
                delta = answer.collect(request)
            except Exception as error:
                # One answer that cannot be written must not end the thread that serves all.
                request.cancel()
                delta = Delta(finish_reason="error", error=error)
            if delta is not None:
                news.append((request, answer, delta))
        if not news:
            return
        ended = {id(answer) for _, answer, delta in news if delta.finish_reason is not None}
        with self._lock:
            self._active = [pair for pair in self._active if id(pair[1]) not in ended]
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, news)


def _deliver(news: Sequence[tuple[Request, Answer, Delta]]) -> None:
    for request, answer, delta in news:
        if not answer.mailbox.put(answer.index, delta):
            request.cancel()
