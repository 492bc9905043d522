"""Checkpoints written beside the training: one at a time, and no error of theirs is lost."""

import sys
import threading
import time
from collections.abc import Callable

from transnormer.train.sync import GradSync

# Writings that runs of this process left under way when they were told to end at once.
_left: set[threading.Thread] = set()


def wait_for_left_writings() -> None:
    """Wait for what earlier runs of this process still write: it may be in the next one's directory.

    In a notebook a run that Ctrl-C ended may be resumed by the same process, before its last
    checkpoint has its name.
    """
    while _left:
        _left.pop().join()


class Saver:
    """Runs the writing of a checkpoint in a thread of its own.

    All processes start the same writings, and learn together, between two steps, that one has ended
    or failed. ``drain`` waits for it; it is called before the next one, at the end of a run and
    before a signal ends it.
    """

    def __init__(self, sync: GradSync, tell: Callable[[str], None]) -> None:
        """Nothing is under way.

        Args:
            sync: of the run.
            tell: is told once where checkpoints follow each other faster than they are written.
        """
        self._sync, self._tell = sync, tell
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._polled: float | None = None
        # Seconds from one step to the next, the shortest so far.
        self._step = float("inf")
        self._told = False

    def start(self, write: Callable[[], object]) -> None:
        """Begin a writing; the one before must have been drained."""
        assert self._thread is None

        def run() -> None:
            try:
                write()
            except Exception as error:
                self._error = error

        # A daemon, so that the interpreter does not wait for it either where ``close`` does not.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Between two steps: raise on all processes the error of a writing that all have ended."""
        now = time.perf_counter()
        if self._polled is not None:
            self._step = min(self._step, now - self._polled)
        self._polled = now
        thread = self._thread
        if thread is not None and not self._sync.highest(thread.is_alive()):
            self.drain()

    def make_room(self, step: int, every: int) -> None:
        """``drain`` before the next writing; tell where that took longer than a step.

        Args:
            step: that was made last.
            every: steps between two checkpoints; 0 is only at the end, which may wait.
        """
        began = time.perf_counter()
        self.drain()
        waited = time.perf_counter() - began
        if every and step % every == 0 and waited > self._step and not self._told:
            self._told = True
            self._tell(
                f"step {step}: training waited {waited:.3g} s for the checkpoint before to be written, "
                f"a step takes {self._step:.3g} s; raise train.save_every, or write to a faster disk"
            )

    def drain(self) -> None:
        """Wait for the writing under way, and raise its error."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the writing under way after another error; its own is then not raised.

        A process that is told to end at once does not wait: what is half written is no checkpoint.
        Should it go on all the same, its next run does (``wait_for_left_writings``).
        """
        kind = sys.exc_info()[0]
        if self._thread is not None and (kind is None or issubclass(kind, Exception)):
            self._thread.join()
        elif self._thread is not None:
            _left.add(self._thread)
        self._thread = None
