"""Noticing that a run has diverged, before its numbers reach a record or a checkpoint."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from transnormer.train import checkpoints


class TrainingDiverged(RuntimeError):
    """A loss, a gradient or a parameter is not finite; names the last good checkpoint.

    The one that was being written is looked for when the message is read, after its end.
    """

    def __init__(self, what: str, run_dir: Path | None = None, step: int | None = None) -> None:
        """Say what; with run_dir, beside which good checkpoint from before step."""
        super().__init__(what, run_dir, step)

    def __str__(self) -> str:
        what, run_dir, step = self.args
        if run_dir is None:
            return what
        last = checkpoints.find_checkpoint(run_dir, before=step).path
        return (
            f"{what}; expected a finite number; the last good checkpoint is {last or 'none'}; lower "
            "optimizer.lr or lengthen the warm-up"
        )


def check_finite(values: Mapping[str, float], step: int, run_dir: Path) -> None:
    """Raise TrainingDiverged for the first value that is NaN or infinite at `step`."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingDiverged(f"{name} is {value} at step {step}", run_dir, step)


@torch.no_grad()
def check_parameters(
    model: nn.Module, step: int, run_dir: Path, highest: Callable[[int], int]
) -> None:
    """Raise TrainingDiverged for a parameter with a value that is not finite.

    All processes call it and raise alike; highest is the largest of all processes' values.
    """
    # Of parameters that are shared out, this process's share.
    named = {n: getattr(p, "to_local", lambda p=p: p)() for n, p in model.named_parameters()}
    wrong = torch.stack([~share.isfinite().all() for share in named.values()])
    found = highest(int((wrong * torch.arange(1, len(wrong) + 1, device=wrong.device)).max()))
    if found:
        raise TrainingDiverged(
            f"{list(named)[found - 1]} is NaN or infinite after step {step}", run_dir, step
        )
