"""Noticing that a run has diverged, before its numbers reach a record or a checkpoint."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from transnormer.train import checkpoints


class TrainingDiverged(RuntimeError):
    """A loss, a gradient or a parameter is not finite; names the last good checkpoint."""


def check_finite(values: Mapping[str, float], step: int, run_dir: Path) -> None:
    """Raise TrainingDiverged for the first value that is NaN or infinite at `step`."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise _diverged(f"{name} is {value} at step {step}", run_dir, step)


@torch.no_grad()
def check_parameters(model: nn.Module, step: int, run_dir: Path) -> None:
    """Raise TrainingDiverged for the first parameter with a value that is not finite."""
    named = list(model.named_parameters())
    finite = torch.stack([parameter.isfinite().all() for _, parameter in named])
    if not bool(finite.all()):
        name = named[finite.tolist().index(False)][0]
        raise _diverged(f"{name} is NaN or infinite after step {step}", run_dir, step)


def _diverged(what: str, run_dir: Path, step: int) -> TrainingDiverged:
    """Describe it; a checkpoint of this very step is not a good one."""
    last = checkpoints.find_checkpoint(run_dir, before=step).path
    return TrainingDiverged(
        f"{what}; expected a finite number; the last good checkpoint is {last or 'none'}; lower "
        "optimizer.lr or lengthen the warm-up"
    )
