"""How the rows of ``dist_gpu`` are measured, on each of the ranks."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from dist_gpu_subjects import Options, Row, Run, backends, check, wait
from torch import Tensor
from torch.distributed.tensor import DTensor
from train_gpu_subjects import Row as TrainRow
from train_gpu_subjects import decoder_of, kernels_of

from transnormer.config import apply_overrides
from transnormer.parallel import current_world
from transnormer.parallel.mesh import Axes, start_processes
from transnormer.parallel.plan import Machine, layouts
from transnormer.train import RunConfig, run_training
from transnormer.train.checkpoints import COMPLETE, step_path
from transnormer.train.metrics import Quiet, StepReport
from transnormer.train.processes import join_processes
from transnormer.train.sync import GradSync

Tell = Callable[..., None]
# Rows of more tokens than this are timed once, without a warm-up.
_LONG = 1 << 21
# Shares of the predicted longest row that are tried, until memory runs out.
_TRIED = (0.5, 0.8, 1.0, 1.1, 1.2, 1.3)
# The step behind which a checkpoint is written, and steps beside that at most: fewer, so that the
# next one is never due.
_SAVED_AT, _BESIDE = 56, 55
# Updates of an outer round's row at most, rounds until their length is settled, and those timed.
_MOST_UPDATES, _UNSETTLED, _ROUNDS = 300, 4, 3


def timed(run: Run, options: Options, *, warmup: int, steps: int) -> dict[str, Any]:
    """The median of updates after the warm-up, tokens a second, peak memory.

    An update ends when its loss is read, so that updates follow each other as in a run.
    """
    if not options.dry:
        torch.cuda.reset_peak_memory_stats()
    times, made = [], []
    for index in range(warmup + steps):
        began = time.perf_counter()
        made.append(run.update())
        if index < warmup:
            wait(options)
        times.append(time.perf_counter() - began)
    median = statistics.median(times[warmup:])
    found: dict[str, Any] = {
        "first_step_s": times[0],
        "step_ms": 1e3 * median,
        "slowest_ms": 1e3 * max(times[warmup:]),
        "tokens": run.tokens,
        "tokens_per_second": run.tokens / median,
        "losses": [made[0].loss, made[-1].loss],
        "grad_norm": made[0].grad_norm,
    }
    return found | memory(options)


def memory(options: Options) -> dict[str, float]:
    """The allocator's peaks since they were reset, in 10^9 bytes, and what the device has in use."""
    if options.dry:
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        "in_use_gb": (total - free) / 1e9,
    }


def measure_updates(tell: Tell, row: Row, options: Options) -> None:
    """Updates of one length, where the ranks have been shown equal to one GPU."""
    backend = backends(row, options)[0] if row.alone else check(tell, row, options)
    run = Run(row, options)
    with run.attention(backend):
        tell(**timed(run, options, warmup=row.warmup, steps=row.steps))
        if options.kernels and not options.dry:
            kernels, total = kernels_of(lambda: [run.update().loss], options.kernels)
            tell(kernels=kernels, kernels_ms=total)


def measure_lengths(tell: Tell, row: Row, options: Options) -> None:
    """The same model at several lengths, each a fact of its own as soon as it is found."""
    backend = check(tell, row, options)
    run = Run(row, options)
    for length in row.lengths:
        run.take(length, length)
        warmup = 0 if length > _LONG else (row.warmup if length == row.lengths[0] else 1)
        steps = 1 if length > _LONG else row.steps
        with run.attention(backend):
            tell(**{str(length): timed(run, options, warmup=warmup, steps=steps)})


def predicted_longest(row: Row, options: Options) -> int:
    """Tokens of the longest row that ``transnormer plan`` finds room for on two such devices."""
    if options.dry:
        return 65_536
    config = decoder_of(TrainRow(row.subject, 0, size=row.size), dry=False, layers=None)
    machine = Machine(memory=float(torch.cuda.get_device_properties(0).total_memory))
    few, many = 1, 1 << 10
    while many - few > 1:
        middle = (few + many) // 2
        plans = layouts(config, 2, 4_096 * middle, machine)
        fits = any(plan.axes == Axes(sp=2) and plan.rows == 1 for plan in plans)
        few, many = (middle, many) if fits else (few, middle)
    return 4_096 * few


def measure_largest(tell: Tell, row: Row, options: Options) -> None:
    """The longest rows that fit, with the predicted one told before the first is tried."""
    check(tell, row, options)
    predicted = predicted_longest(row, options)
    tell(predicted_tokens=predicted)
    run = Run(row, options)
    for share in _TRIED:
        tokens = int(share * predicted) // 4_096 * 4_096
        tell(tried_tokens=tokens)
        run.take(tokens, tokens)
        found = timed(run, options, warmup=0, steps=1)
        tell(reached_tokens=tokens, **found)


def measure_outer(tell: Tell, row: Row, options: Options) -> None:
    """Whole rounds of copies that meet, once their length is settled."""
    small = Run(row, options, small=True)
    before = _held(small)
    for _ in range(6):
        small.update()
    after = _held(small)
    high, low = after.clone(), after.clone()
    dist.all_reduce(high, dist.ReduceOp.MAX)
    dist.all_reduce(low, dist.ReduceOp.MIN)
    spread, moved = float((high - low).abs().max()), float((after - before).abs().max())
    if spread or not moved:
        raise RuntimeError(f"copies differ by {spread} after they met, and moved by {moved}")
    tell(check={"spread": spread, "moved": moved})
    del small, before, after, high, low
    run, times, rounds, notes = Run(row, options), [], [], []
    for _ in range(_MOST_UPDATES):
        began = time.perf_counter()
        made = run.update()
        times.append(time.perf_counter() - began)
        if made.outer is not None:
            notes += [made.outer.note] if made.outer.note else []
            rounds.append((len(times), made.outer))
        if len(rounds) == _UNSETTLED + _ROUNDS:
            break
    # One of a busy CPU may be so long that none follows it.
    ends = [end for end, _ in rounds[1 if options.dry else _UNSETTLED - 1 :]]
    spans = [sum(times[a:b]) for a, b in zip(ends, ends[1:])]
    if not spans:
        raise RuntimeError(f"{len(rounds)} rounds in {len(times)} updates; expected more: {notes}")
    tell(
        tau=rounds[-1][1].tau,
        notes=notes,
        round_ms=1e3 * statistics.median(spans),
        rounds_ms=[1e3 * span for span in spans],
        exposed=[report.exposed for _, report in rounds],
        **memory(options),
    )


def _held(run: Run) -> Tensor:
    """What this rank holds of the parameters, end to end."""
    parts = [x.to_local() if isinstance(x, DTensor) else x for x in run.model.parameters()]
    return torch.cat([x.detach().float().flatten() for x in parts])


def measure_link(tell: Tell, row: Row, options: Options) -> None:
    """Bus bandwidth of an all-reduce of a GiB: bytes that a rank must send, over the time."""
    device = start_processes("cpu" if options.dry else "cuda")
    x = torch.ones(1 << (12 if options.dry else 28), device=device)
    times = []
    for _ in range(5):
        wait(options)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(x)
        wait(options)
        times.append(time.perf_counter() - began)
    ranks = dist.get_world_size()
    sent = 2 * (ranks - 1) / ranks * x.numel() * 4
    tell(ranks=ranks, all_reduce_ms=1e3 * times[-1], gb_per_s=sent / min(times[1:]) / 1e9)


class _Clock(Quiet):
    """When the steps of a run were reported, by the clock of the files."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def step(self, report: StepReport, steps: int) -> None:
        """Note the time."""
        self.times.append(time.time())


class _Seen(Exception):
    """What a run was for has been measured."""


def _until_written(sync: GradSync, written: Path) -> Callable[[Any, int], None]:
    """What ends a run on all ranks, within a step, when its checkpoint lies there."""

    def after_step(model: Any, step: int) -> None:
        # One step beside the writing is reported whatever it takes.
        if step >= _SAVED_AT + 2:
            over = sync.is_first and written.exists()
            if sync.highest(over) or step >= _SAVED_AT + _BESIDE:
                raise _Seen

    return after_step


def measure_checkpoint(tell: Tell, row: Row, options: Options) -> None:
    """Times of a whole run's steps before a checkpoint and beside its writing.

    The saving step counts as the first one beside it; the run is broken off behind the writing.
    """
    folder = Path(tempfile.gettempdir()) / f"dist_gpu_{os.environ['MASTER_PORT']}"
    sizes = {"model_dim": 64, "num_layers": 2, "heads": 2, "glu_dim": 96}
    data = {
        "model": sizes if options.dry else {"name": f"tnl-{row.size}"},
        "data": {"seq": 64 if options.dry else row.lengths[0]},
        "train": {
            "steps": _SAVED_AT + _BESIDE,
            "tokens_per_step": 256 if options.dry else row.tokens,
            "save_every": _SAVED_AT,
            "keep_last": 1,
            "precision": "bfloat16",
        },
        "output": {"dir": str(folder)},
    }
    settings = [x for x in row.settings if not (options.dry and "compil" in x)]
    config = RunConfig.model_validate(apply_overrides(data, settings))
    sync, _ = join_processes(config, torch.device("cpu" if options.dry else "cuda"))
    clock, target = _Clock(), step_path(folder, _SAVED_AT)
    try:
        with patch.object(sync, "after_step", _until_written(sync, target)), suppress(_Seen):
            run_training(config, progress=clock, sync=sync)
        if sync.is_first:
            tell(**_beside(clock.times, target), **memory(options))
    finally:
        if current_world().rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _beside(times: list[float], target: Path) -> dict[str, Any]:
    """What the steps' times say of the writing of a checkpoint."""
    spans = [1e3 * (b - a) for a, b in zip(times, times[1:])]
    began, ended = times[_SAVED_AT - 1], (target / COMPLETE).stat().st_mtime
    beside = [x for at, x in zip(times[_SAVED_AT - 1 :], spans[_SAVED_AT - 1 :]) if at < ended]
    return {
        # The first steps compile and allocate.
        "step_ms": statistics.median(spans[3 : _SAVED_AT - 1]),
        "beside_ms": statistics.mean(beside),
        "saving_ms": beside[0],
        "worst_beside_ms": max(beside),
        "steps_beside": len(beside),
        "writing_s": ended - began,
        "written_gb": sum(x.stat().st_size for x in target.rglob("*") if x.is_file()) / 1e9,
        "steps_ms": spans,
    }


MEASURES: dict[str, Callable[[Tell, Row, Options], None]] = {
    "updates": measure_updates,
    "lengths": measure_lengths,
    "largest": measure_largest,
    "outer": measure_outer,
    "link": measure_link,
    "checkpoint": measure_checkpoint,
}
