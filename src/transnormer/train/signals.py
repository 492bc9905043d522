"""What SIGINT and SIGTERM do to a run: end it cleanly, whatever it is doing."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal, NoReturn, cast

SignalName = Literal["SIGINT", "SIGTERM"]
# The name of the signal that asked to stop, None before one did.
Stop = Callable[[], SignalName | None]
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Terminated(SystemExit):
    """The end of the process that SIGTERM asked for."""


@contextmanager
def termination_raises(tell: Callable[[str], None]) -> Iterator[None]:
    """Make SIGTERM raise SystemExit(143), as SIGINT raises KeyboardInterrupt, and tell of it.

    What is half made is then cleaned up before the process ends. Only the main thread can take
    signals; in another one this changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except _Terminated:
        tell("stopped by SIGTERM")
        raise
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Give a function that returns the name of the signal that asked to stop, or None.

    The signal's own effect comes back after the first one: a second Ctrl-C ends the process at
    once. Only the main thread can take signals; in another one this changes nothing.
    """
    asked: list[SignalName] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(cast(SignalName, signal.Signals(number).name))
        restore()

    for number in _SIGNALS:
        signal.signal(number, ask)
    try:
        yield lambda: asked[0] if asked else None
    finally:
        restore()
