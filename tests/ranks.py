"""Processes that talk to each other, started once a test session and used by all tests.

A test hands a function of an importable module (tests/*.py) to ``Ranks.run``; it is called on so many
ranks as ``function(group, *args)``, and what each rank returned comes back in the order of ranks.
"""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from interpreter import patch_language_once_a_launch

from transnormer.parallel import mesh

SIZES = (1, 2, 3, 4, 8)
_IMPORTS = ["transnormer.parallel.layout", "transnormer.train", "torch.distributed.tensor.parallel"]
# Seconds that every rank would otherwise spend by itself, when it first compiles or adapts.
_LATER_IMPORTS = ["torch._inductor.compile_fx", "peft"]
# The longest call of a test.
_PATIENCE = 100.0


class _Groups:
    """Hands out the groups and meshes of earlier calls again.

    A gloo group keeps threads of its own for as long as its process lives, and every layout makes
    several; after some hundred tests thousands of them would compete for the processors.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._asked: Counter[str] = Counter()
        makers = ((mesh, "init_device_mesh"), (dist, "new_group"))
        for place, name in (*makers, (dist, "new_subgroups_by_enumeration")):
            setattr(place, name, self._remembered(getattr(place, name)))

    def begin(self) -> None:
        """A call begins: what it asks for twice is made twice."""
        self._asked.clear()

    def _remembered(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def give(*args: Any, **kwargs: Any) -> Any:
            asked = f"{make.__name__}{args}{sorted(kwargs.items())}"
            key = f"{asked} {self._asked[asked]}"
            self._asked[asked] += 1
            if key not in self._made:
                self._made[key] = make(*args, **kwargs)
            return self._made[key]

        return give


def _serve(rank: int, size: int, store: str, pipe: Any, backend: str) -> None:
    """One rank: runs what comes through the pipe until None comes."""
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
        # What a launcher says, for runs that join these processes.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    else:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        patch_language_once_a_launch()
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    groups = {n: dist.new_group(list(range(n))) for n in SIZES if n <= size}
    shared = _Groups()
    # Bytes: a pipe's own pickling shares memory of tensors, which ends with the process.
    while (call := pickle.loads(pipe.recv_bytes())) is not None:
        function, count, args = call
        torch.manual_seed(0)
        shared.begin()
        try:
            answer = (True, function(groups[count], *args))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


class Ranks:
    """A pool of processes with a group of 1, 2, 3, 4 (and 8) of them; started when first used.

    Backend "nccl" gives each a GPU.
    """

    def __init__(self, size: int, folder: Path, backend: str = "gloo") -> None:
        self.size, self._folder, self._starts = size, folder, 0
        self._backend = backend
        self._pipes: list[Any] = []
        self._processes: list[Any] = []

    def _start(self) -> None:
        if self._backend == "nccl":
            # Imports may look for GPUs, and a process that has looked cannot be forked for one.
            context = multiprocessing.get_context("spawn")
        else:
            # Forked from a process that has done the imports: they cost more than all the tests.
            context = multiprocessing.get_context("forkserver")
            # Of those some look for GPUs, which a forked process could not use any more.
            later = [] if torch.cuda.is_available() else _LATER_IMPORTS
            context.set_forkserver_preload(_IMPORTS + later)
        self._starts += 1
        store = str(self._folder / f"store{self._starts}")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, store, theirs, self._backend), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call the function on the first ``count`` ranks; fails as soon as it fails on one."""
        if not self._processes:
            self._start()
        waiting = dict(zip(self._pipes, range(count)))
        for pipe in waiting:
            pipe.send_bytes(pickle.dumps((function, count, args)))
        results: list[Any] = [None] * count
        failures: list[str] = []
        deadline = time.monotonic() + _PATIENCE
        while waiting:
            left = max(deadline - time.monotonic(), 0.0)
            # Ranks may wait for one that has failed.
            ready: Any = multiprocessing.connection.wait(waiting, 1.0 if failures else left)
            if not ready:
                failures.append(f"ranks {sorted(waiting.values())} did not answer")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    good, results[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    good, results[rank] = False, "the process has ended"
                if not good:
                    failures.append(f"rank {rank}: {results[rank]}")
        if failures:
            # Ranks of a call that failed on one may be left in the middle of an exchange.
            self.close()
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            # A run takes SIGTERM for a wish, and one that waits for others never comes to it.
            process.kill()
            process.join()
        self._pipes, self._processes = [], []
