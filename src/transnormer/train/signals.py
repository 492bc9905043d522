"""Ending a run on SIGINT or SIGTERM after the step in which it arrives."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_requests() -> Iterator[Callable[[], str | None]]:
    """Give a function that returns the name of the signal that asked to stop, or None.

    The signal's own effect comes back after the first one: a second Ctrl-C ends the process at
    once. Only the main thread can take signals; in another one this changes nothing.
    """
    asked: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)
        restore()

    for number in _SIGNALS:
        signal.signal(number, ask)
    try:
        yield lambda: asked[0] if asked else None
    finally:
        restore()
