"""A run on one process or on many: which it is, and what only one of them does."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch

from transnormer.parallel import current_world
from transnormer.train.precision import choose_precision
from transnormer.train.recipe import RunConfig
from transnormer.train.run_directory import RunDirectory, open_run, preparation
from transnormer.train.signals import SignalName, Stop
from transnormer.train.sync import GradSync, OneProcess

T = TypeVar("T")
_SIGNALS: tuple[SignalName | None, ...] = (None, "SIGINT", "SIGTERM")


def join_processes(config: RunConfig, device: torch.device) -> tuple[GradSync, torch.device]:
    """How this process trains with those that the launcher started, and its own device.

    Raises:
        ValueError: the [parallel] table does not fit the number of processes.
        NotImplementedError: a setting that exists for one process alone.
        RuntimeError: the launcher's variables are wrong.
    """
    world = current_world()
    config.parallel.axes(world.world_size)
    if world.world_size == 1:
        return OneProcess(), device
    _refuse(config)
    # torch.distributed costs a second to import, which one process need not pay.
    from transnormer.parallel.local_layout import build_layout
    from transnormer.parallel.mesh import start_processes

    device = start_processes(device.type)
    half = choose_precision(config.train.precision, device) == "bfloat16"
    gather_dtype = torch.bfloat16 if half else None
    layout = build_layout(config.parallel, world.world_size, device, gather_dtype=gather_dtype)
    return cast(GradSync, layout), device


def _refuse(config: RunConfig) -> None:
    """Raise NotImplementedError for what one process alone can do."""
    refused: dict[str, tuple[Any, bool, str]] = {
        "guard.action": (
            config.guard.action,
            config.guard.action == "rollback" and config.parallel.outer is not None,
            "copies that update on their own have no one state to go back to; take 'skip'",
        ),
        "train.segment_tokens": (
            config.train.segment_tokens,
            config.train.segment_tokens is not None and config.parallel.tp > 1,
            "states of heads that lie on several ranks are not cut; set parallel.tp to 1",
        ),
        "train.checkpointing": (
            config.train.checkpointing,
            config.train.checkpointing != "none"
            and config.train.compile
            and config.parallel.sp > 1
            and config.train.segment_tokens is None,
            "states are exchanged outside of graphs, and a block that is computed again is one graph "
            "or none; set one of it, train.compile and parallel.sp to its default",
        ),
        "train.cuda_graph": (
            config.train.cuda_graph,
            config.train.cuda_graph,
            "collectives are not captured; set it to false",
        ),
        "objective.kind": (
            config.objective.kind,
            config.objective.kind != "causal",
            "only the causal objective's evaluation runs on shared parameters",
        ),
        "lora": (
            config.lora,
            config.lora is not None,
            "adapters are not laid out on ranks; leave it out",
        ),
        "optimizer.name": (
            config.optimizer.name,
            config.optimizer.name == "muon",
            "its updates need whole matrices, which no rank holds; take 'adamw'",
        ),
    }
    for key, (value, wrong, why) in refused.items():
        if wrong:
            raise NotImplementedError(
                f"{key} is {value!r}; expected another value with several processes: {why}"
            )


@contextmanager
def open_together(config: RunConfig, sync: GradSync, *, resume: bool) -> Iterator[RunDirectory]:
    """Give the run directory that the first process opens, locks and cleans up; see ``open_run``.

    Raises on all processes what it raises on the first.
    """
    with ExitStack() as stack:
        yield sync.from_first(lambda: stack.enter_context(open_run(config, resume=resume)))


@contextmanager
def prepare_together(run: RunDirectory, config: RunConfig, sync: GradSync) -> Iterator[None]:
    """``preparation`` by the first process alone."""
    with preparation(run, config) if sync.is_first else nullcontext():
        yield


def first_then_others(sync: GradSync, make: Callable[[], T]) -> T:
    """Call a function on the first process, then on all others; each keeps its own result.

    What the first one prepares on the disk is then there for the others.
    """
    made: list[T] = []
    sync.from_first(lambda: made.append(make()))
    return made[0] if made else make()


def agreed(stop: Stop, sync: GradSync) -> Stop:
    """The signal that any process got, which all learn of at the same point of the run."""
    return lambda: _SIGNALS[sync.highest(_SIGNALS.index(stop()))]


def seed_of(seed: int, process: int, step: int) -> int:
    """The seed of a process's own random numbers from a step on; the first one's is the run's."""
    return (seed + process * 0x9E3779B97F4A7C15 + (step * 0xBF58476D1CE4E5B9 if process else 0)) % (
        1 << 63
    )


class NoRecords:
    """What a process that is not the first records: nothing."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Drop it."""

    evaluation = rollback = sync = close = step
