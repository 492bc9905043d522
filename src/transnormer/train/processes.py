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
# Key, value, whether it is refused here, and why.
_Refused = tuple[str, Any, bool, str]
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
    from transnormer.parallel.layout import Layout
    from transnormer.parallel.local_layout import build_layout
    from transnormer.parallel.mesh import start_processes
    from transnormer.train.adapter_layout import AdapterLayout

    device = start_processes(device.type)
    half = choose_precision(config.train.precision, device) == "bfloat16"
    gather_dtype = torch.bfloat16 if half else None
    layout = build_layout(
        config.parallel,
        world.world_size,
        device,
        gather_dtype=gather_dtype,
        keeps_rest=config.splits_weights,
        kind=Layout if config.lora is None else AdapterLayout,
    )
    return cast(GradSync, layout), device


def _refuse(config: RunConfig) -> None:
    """Raise NotImplementedError for what one process alone can do."""
    for key, value, wrong, why in _refused_settings(config) + _refused_kinds(config):
        if wrong:
            raise NotImplementedError(
                f"{key} is {value!r}; expected another value with several processes: {why}"
            )


def _refused_settings(config: RunConfig) -> list[_Refused]:
    """How a run may not be computed."""
    parallel = config.parallel
    return [
        (
            "guard.action",
            config.guard.action,
            config.guard.action == "rollback" and parallel.outer is not None,
            "copies that update on their own have no one state to go back to; take 'skip'",
        ),
        (
            "train.segment_tokens",
            config.train.segment_tokens,
            config.train.segment_tokens is not None and parallel.tp > 1,
            "states of heads that lie on several ranks are not cut; set parallel.tp to 1",
        ),
        (
            "train.checkpointing",
            config.train.checkpointing,
            config.train.checkpointing != "none"
            and config.train.compile
            and parallel.sp > 1
            and config.train.segment_tokens is None,
            "states are exchanged outside of graphs, and a block that is computed again is one graph "
            "or none; set one of it, train.compile and parallel.sp to its default",
        ),
        (
            "train.float8",
            config.train.float8,
            config.train.float8 != "none" and parallel.tp > 1,
            "the parts of a projection on several ranks have products of their own; set parallel.tp "
            "to 1",
        ),
        (
            "train.cuda_graph",
            config.train.cuda_graph,
            config.train.cuda_graph,
            "collectives are not captured; set it to false",
        ),
    ]


def _refused_kinds(config: RunConfig) -> list[_Refused]:
    """What may not be trained."""
    parallel, adapters = config.parallel, config.lora is not None
    return [
        (
            "objective.kind",
            config.objective.kind,
            config.objective.kind == "classification" and parallel.sp > 1,
            "a text has one label, which no part of it can be asked for alone; set parallel.sp to 1",
        ),
        (
            "lora",
            config.lora,
            adapters and parallel.tp > 1,
            "adapters of projections that lie on several ranks are not cut; set parallel.tp to 1",
        ),
        (
            "lora",
            config.lora,
            adapters and parallel.outer is not None,
            "copies that go apart export their mean, into which no adapters are merged; leave "
            "[parallel.outer] out",
        ),
    ]


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
