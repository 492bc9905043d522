"""Checkpoints written beside the training: one at a time, and no error of theirs is lost."""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from transnormer.train.sync import GradSync


class _Writing(threading.Thread):
    """A checkpoint being written to a run's directory.

    A daemon, so that the interpreter does not wait for it where ``Saver.close`` does not.
    """

    def __init__(self, write: Callable[[], object], run_dir: Path) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.run_dir = run_dir.resolve()
        self.error: Exception | None = None
        # To be waited for: an interrupted join of Python 3.11 takes the thread for ended.
        self.ended = threading.Event()
        self._write = write

    def run(self) -> None:
        try:
            self._write()
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()


def wait_for_left_writing(run_dir: Path, tell: Callable[[str], None]) -> None:
    """Wait for what an earlier run of this process still writes to the directory.

    In a notebook a run that Ctrl-C ended may be resumed by the same process, before its last
    checkpoint has its name.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _Writing) and thread.run_dir == run_dir.resolve():
            if not thread.ended.is_set():
                tell(f"waiting for the checkpoint that an earlier run still writes to {run_dir}")
            thread.ended.wait()


class Saver:
    """Runs the writing of a checkpoint in a thread of its own.

    All processes start the same writings, and learn together, between two steps, that one has ended
    or failed. ``drain`` waits for it; it is called before the next one, at the end of a run and
    before a signal ends it.
    """

    def __init__(self, sync: GradSync, tell: Callable[[str], None], run_dir: Path) -> None:
        """Nothing is under way.

        Args:
            sync: of the run.
            tell: is told once where checkpoints follow each other faster than they are written.
            run_dir: of the run.
        """
        self._sync, self._tell, self._run_dir = sync, tell, run_dir
        self._thread: _Writing | None = None
        self._polled: float | None = None
        # Seconds from one step to the next, the shortest so far.
        self._step = float("inf")
        self._told = False

    def start(self, write: Callable[[], object]) -> None:
        """Begin a writing; the one before must have been drained."""
        assert self._thread is None
        self._thread = _Writing(write, self._run_dir)
        self._thread.start()

    def poll(self) -> None:
        """Between two steps: raise on all processes the error of a writing that all have ended."""
        now = time.perf_counter()
        if self._polled is not None:
            self._step = min(self._step, now - self._polled)
        self._polled = now
        thread = self._thread
        if thread is not None and not self._sync.highest(not thread.ended.is_set()):
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
        thread.ended.wait()
        if thread.error is not None:
            raise thread.error

    def close(self) -> None:
        """Wait for the writing under way after another error; its own is then not raised.

        A process that is told to end at once does not wait: what is half written is no checkpoint.
        Should it go on all the same, its next run does (``wait_for_left_writing``).
        """
        kind = sys.exc_info()[0]
        if self._thread is not None and (kind is None or issubclass(kind, Exception)):
            self._thread.ended.wait()
        self._thread = None
