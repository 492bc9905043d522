"""Runs with planted loss spikes, on one process or several."""

from typing import Any

import torch
import torch.distributed as dist

from transnormer.data import Batch
from transnormer.parallel.layout import Layout
from transnormer.parallel.mesh import Axes
from transnormer.train import OneProcess, RunConfig, run_training
from transnormer.train.objectives.windows import WindowObjective


def run_with_spikes(
    group: dist.ProcessGroup | None,
    config: RunConfig,
    axes: Axes,
    numbers: tuple[int, ...],
    resume: bool = False,
) -> int:
    """Train where the batches of some numbers ask for a byte that never occurs; the steps done."""
    plain = WindowObjective.batch

    def batch(self: WindowObjective, index: int) -> Batch:
        found = plain(self, index)
        if index in numbers:
            found = found._replace(labels=torch.full_like(found.labels, 7))
        return found

    sync: Any = OneProcess() if group is None else Layout(axes, torch.device("cpu"))
    WindowObjective.batch = batch  # type: ignore[method-assign]
    try:
        return run_training(config, sync=sync, resume=resume).step
    finally:
        WindowObjective.batch = plain  # type: ignore[method-assign]
