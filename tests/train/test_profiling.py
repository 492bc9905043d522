"""Profiles of a run: files, table, and no change of its result."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from train_cases import Notes

from transnormer.models import checkpoint
from transnormer.train import RunConfig, run_training
from transnormer.train.profiling import Cost, ProfileConfig, StepProfiler, costs, table

MakeConfig = Callable[..., RunConfig]


def test_a_profile_is_a_trace_and_a_table_and_changes_nothing(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    plain = run_training(make_config(f"output.dir={tmp_path / 'plain'}"))
    config = make_config("profile.steps=[2, 3]", "profile.rows=4")
    run = run_training(config, progress=(notes := Notes())).run_dir
    names = {event.get("name") for event in trace(run)["traceEvents"]}
    assert {"aten::mm", "transnormer::linear_cross_entropy"} <= names
    lines = (run / "profile" / "costliest.txt").read_text().splitlines()
    assert len(lines) == 1 + 4
    times = [float(line.split()[0]) for line in lines[1:]]
    assert times == sorted(times, reverse=True)
    assert times[-1] > 0
    at = notes.messages.index(f"profile of steps 2 to 3 in {run / 'profile'}")
    assert notes.messages[at + 1 : at + 6] == lines
    for a, b in zip(
        checkpoint.load(run).parameters(), checkpoint.load(plain.run_dir).parameters(), strict=True
    ):
        assert torch.equal(a, b)


def trace(run: Path) -> dict:
    return json.loads((run / "profile" / "trace.json").read_text())


def test_a_resumed_run_may_be_profiled(make_config: MakeConfig) -> None:
    config = make_config("train.max_minutes=1e-9")
    run_training(config)
    run_training(make_config("profile.steps=[1, 2]"), resume=True, progress=(notes := Notes()))
    assert any(message.startswith("profile of steps 2 to 2 ") for message in notes.messages)


def test_a_run_that_ends_within_its_profile_writes_none(make_config: MakeConfig) -> None:
    config = make_config("profile.steps=[5, 100]")
    result = run_training(config, progress=(notes := Notes()))
    assert not (result.run_dir / "profile").exists()
    told = f"no profile: profile.steps is [5, 100], and the run ended after step {result.step}"
    assert told in notes.messages


def test_steps_behind_the_last_are_told(make_config: MakeConfig) -> None:
    run_training(make_config("profile.steps=[90, 100]"), progress=(notes := Notes()))
    assert any(message.startswith("no profile: ") for message in notes.messages)


def test_steps_made_again_after_a_rollback_count(tmp_path: Path) -> None:
    found: list[str] = []
    profiler = StepProfiler(
        ProfileConfig(steps=(2, 3)), tmp_path, torch.device("cpu"), found.append
    )
    x = torch.ones(2)
    for step in (1, 2, 1, 2, 3):
        profiler.before(step)
        x.exp()
        profiler.after(step)
    calls = next(line.split()[2] for line in found if line.endswith(" aten::exp"))
    assert calls == "1.0"


@pytest.mark.parametrize("steps", ["[0, 3]", "[4, 3]"])
def test_steps_that_are_no_range_are_refused(make_config: MakeConfig, steps: str) -> None:
    with pytest.raises(ValueError, match=r"profile.steps is .*; expected the first and the last"):
        make_config(f"profile.steps={steps}")


def event(name: str, device: DeviceType, time: float, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        device_type=device,
        self_cpu_time_total=time,
        self_device_time_total=10 * time,
        is_user_annotation=annotation,
    )


def test_kernels_count_where_there_are_any() -> None:
    cpu = [event("launch", DeviceType.CPU, 9e6), event("launch", DeviceType.CPU, 1e6)]
    assert costs(cpu) == [Cost("launch", 2, 10_000.0)]
    gpu = [
        event("small", DeviceType.CUDA, 100),
        event("large", DeviceType.CUDA, 200),
        event("large", DeviceType.CUDA, 200),
        event("step", DeviceType.CUDA, 500, annotation=True),
    ]
    assert costs(cpu + gpu) == [Cost("large", 2, 4.0), Cost("small", 1, 1.0)]
    assert table(costs(gpu), 1, 2) == [
        "  ms/step   share  calls/step  name",
        "    2.000   80.0%         1.0  large",
    ]
