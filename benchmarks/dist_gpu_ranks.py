"""Processes, one a GPU, that run the rows of a benchmark one after the other.

They are started once for many rows: to import, to load kernels and to make a CUDA context takes
longer than most rows. Each row joins a process group of its own, as a launcher's attempts do.
"""

import gc
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.distributed as dist
from subjects import error_text

# So many seconds for the answers of ranks that may wait for one that has failed.
_GRACE = 8.0
# Bytes that a row may leave on a device before its processes are replaced.
_LEFT = 1e9


class Answer(NamedTuple):
    """What a row came to on all ranks.

    Attributes:
        found: what each rank told, also before it failed.
        error: of the first rank that failed; None where none did.
    """

    found: list[dict[str, Any]]
    error: str | None


def _serve(rank: int, size: int, port: int, variables: Mapping[str, str], pipe: Any) -> None:
    """One rank: runs what comes through the pipe until None comes."""
    os.environ.update(variables)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    while (call := pipe.recv()) is not None:
        function, attempt, args = call
        # Names of the group's keys in the store, which outlives it.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        error, left = None, 0
        try:
            function(lambda **facts: pipe.send(facts), *args)
        except NotImplementedError as refusal:
            pipe.send({"not_available": error_text(refusal)})
        except Exception as failure:
            error = error_text(failure)
        if error is None:
            if dist.is_initialized():
                dist.destroy_process_group()
            torch._dynamo.reset()
            gc.collect()
            if has_gpu:
                torch.cuda.empty_cache()
                left = torch.cuda.memory_allocated()
        pipe.send((error, left))


class Ranks:
    """A pool of processes; started by the first row, and again by the row after a failure."""

    def __init__(self, size: int, variables: Mapping[str, str] | None = None) -> None:
        self.size, self._variables = size, dict(variables or {})
        self._store: dist.TCPStore | None = None
        self._attempts = 0
        self._pipes: list[Any] = []
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # A store of their own: the counters of groups that died stay in the old one.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            args = (rank, self.size, self._store.port, self._variables, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., None], *args: Any, limit: float) -> Answer:
        """Call ``function(tell, *args)`` on every rank; facts that it tells count at once.

        Args:
            function: of an importable module.
            args: its arguments, to be pickled.
            limit: seconds after which the processes are ended.
        """
        if not self._processes:
            self._start()
        self._attempts += 1
        for pipe in self._pipes:
            pipe.send((function, self._attempts, args))
        waiting = dict(zip(self._pipes, range(self.size)))
        found: list[dict[str, Any]] = [{} for _ in waiting]
        error, most, deadline = None, 0, time.monotonic() + limit
        while waiting:
            left = min(deadline - time.monotonic(), _GRACE if error else limit)
            ready: Any = multiprocessing.connection.wait(waiting, max(left, 0.0))
            if not ready:
                error = error or f"not done after {limit:.0f} s"
                break
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    said = pipe.recv()
                except EOFError:
                    said = ("its process ended", 0)
                if isinstance(said, dict):
                    found[rank] |= said
                    continue
                del waiting[pipe]
                most = max(most, said[1])
                if said[0] is not None:
                    error = error or f"rank {rank}: {said[0]}"
        if error is not None or most > _LEFT:
            self.close()
        return Answer(found, error)

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes, self._store = [], [], None
