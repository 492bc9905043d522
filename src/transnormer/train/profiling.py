"""A profile of a few updates: a trace, a memory snapshot, and the operations that cost the most."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, field_validator
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from transnormer.config import Config

PROFILE = "profile"
TRACE, TABLE, MEMORY = "trace.json", "costliest.txt", "memory.pickle"
# Allocations that the snapshot of a GPU's memory remembers.
_ALLOCATIONS = 1_000_000


class ProfileConfig(Config):
    """Which updates are profiled.

    Attributes:
        steps: the first and the last one, from 1; None profiles nothing.
        rows: of the table of costs.
    """

    steps: tuple[int, int] | None = None
    rows: int = Field(default=10, ge=1)

    @field_validator("steps")
    @classmethod
    def _check_steps(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError(
                f"steps is {list(steps)}; expected the first and the last step, from 1; for "
                "example [10, 12]"
            )
        return steps


class Cost(NamedTuple):
    """A kernel on a GPU, or an operation on a CPU: its own time, without what it calls.

    Attributes:
        name: of the kernel or operation.
        calls: how often it ran.
        milliseconds: of all calls together.
    """

    name: str
    calls: int
    milliseconds: float


def costs(events: Iterable[Any]) -> list[Cost]:
    """Add up a profiler's events by name, the costliest first.

    Kernels where there are any, since the CPU then only launches them; else operations.
    """
    seen = list(events)
    kernels = [event for event in seen if event.device_type == DeviceType.CUDA]
    found: dict[str, list[float]] = defaultdict(list)
    for event in kernels or seen:
        # An annotation on the GPU's timeline spans the kernels that are counted themselves.
        if kernels and getattr(event, "is_user_annotation", False):
            continue
        time = event.self_device_time_total if kernels else event.self_cpu_time_total
        found[event.name].append(time / 1000)
    summed = [Cost(name, len(times), sum(times)) for name, times in found.items()]
    return sorted(summed, key=lambda cost: -cost.milliseconds)


def table(found: list[Cost], rows: int, steps: int) -> list[str]:
    """The costliest as lines: milliseconds a step, share of all, calls a step, name."""
    total = sum(cost.milliseconds for cost in found) or 1.0
    lines = [f"{'ms/step':>9}  {'share':>6}  {'calls/step':>10}  name"]
    lines += [
        f"{cost.milliseconds / steps:9.3f}  {cost.milliseconds / total:6.1%}  "
        f"{cost.calls / steps:10.1f}  {cost.name}"
        for cost in found[:rows]
    ]
    return lines


class StepProfiler:
    """Profiles the steps of a configuration, once in a process."""

    def __init__(
        self,
        config: ProfileConfig,
        run_dir: Path,
        device: torch.device,
        tell: Callable[[str], None],
    ) -> None:
        self._config, self._run_dir, self._device, self._tell = config, run_dir, device, tell
        self._running: profile | None = None
        self._first, self._made, self._last = 0, 0, 0
        self._done = config.steps is None

    def before(self, step: int) -> None:
        """Begin with step number `step`, from 1, if it is the time."""
        steps = self._config.steps
        if self._done or self._running is not None or steps is None:
            return
        if steps[0] <= step <= steps[1]:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
                torch.cuda.synchronize()
            self._first = step
            self._running = profile(activities=activities, acc_events=True)
            self._running.start()

    def after(self, step: int) -> None:
        """End after step number `step`, if it is the last one, and write what was found."""
        self._last = step
        self._made += self._running is not None
        if self._running is None or self._config.steps is None or step < self._config.steps[1]:
            return
        self._finish(step)

    def close(self) -> None:
        """Drop a profile that has not come to its end, and tell of one that was not made."""
        steps = self._config.steps
        if not self._done and steps is not None and self._last < steps[1]:
            self._tell(
                f"no profile: profile.steps is {list(steps)}, and the run ended after step "
                f"{self._last}"
            )
        if self._running is not None:
            self._running.stop()
            self._running = None
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def _finish(self, step: int) -> None:
        assert self._running is not None
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        running, self._running, self._done = self._running, None, True
        running.stop()
        folder = self._run_dir / PROFILE
        folder.mkdir(exist_ok=True)
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(folder / MEMORY))
            torch.cuda.memory._record_memory_history(enabled=None)
        running.export_chrome_trace(str(folder / TRACE))
        found = costs(running.events() or [])
        # Not the span of step numbers: after a rollback some are made again.
        lines = table(found, self._config.rows, self._made)
        (folder / TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._tell(f"profile of steps {self._first} to {step} in {folder}")
        for line in lines:
            self._tell(line)
