"""Processes of one host that train together, started by a command itself instead of torchrun."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
# Seconds that processes have to end by themselves.
_GRACE = 5.0


def call_on_ranks(count: int, function: Callable[..., T], *args: Any) -> T:
    """Call a function in so many new processes; returns what the first one returned.

    Each finds in its environment what torchrun would have said.

    Args:
        count: processes.
        function: importable by its name; its arguments and results can be pickled.

    Raises:
        RuntimeError: a process ended without an answer.
        Exception: what the first process to fail raised there; the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    processes, pipes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(rank, count, port, theirs, function, args), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return _answers(pipes)
    finally:
        # After an error the others mostly fail too, and clean up; some may wait for ever.
        deadline = time.monotonic() + _GRACE
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.0))
            process.terminate()
            process.join()


def _serve(
    rank: int, count: int, port: int, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        answer = (True, function(*args))
    except Exception as error:
        answer = (False, error)
    # Bytes: a pipe's own pickling shares memory of tensors, which ends with the process.
    pipe.send_bytes(pickle.dumps(answer))


def _answers(pipes: list[Any]) -> Any:
    """What the first process returned, once all have answered."""
    waiting, first = dict(zip(pipes, range(len(pipes)), strict=True)), None
    while waiting:
        for pipe in multiprocessing.connection.wait(list(waiting)):
            rank = waiting.pop(pipe)
            try:
                good, answer = pickle.loads(pipe.recv_bytes())  # type: ignore[attr-defined]
            except EOFError as error:
                raise RuntimeError(
                    f"process {rank} ended without an answer; expected one; look for what the "
                    "system says of it, most often that memory ran out"
                ) from error
            if not good:
                raise answer
            if rank == 0:
                first = answer
    return first


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
