"""The micro-batches of a step, prepared while the device is busy with the step before."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from transnormer.train.objectives import Objective


class StepBatches(NamedTuple):
    """What one update reads.

    Attributes:
        parts: micro-batches, on the CPU.
        counts: the sums of their Counts, float64 [3], on the CPU.
    """

    parts: list[Any]
    counts: Tensor


class Batches:
    """Batches by the global index of their first sample, one step of them ahead."""

    def __init__(
        self,
        objective: Objective,
        samples_per_step: int,
        samples_per_batch: int,
        *,
        pinned: bool = False,
    ) -> None:
        """Read an objective.

        Args:
            objective: what makes the batches.
            samples_per_step: of all processes.
            samples_per_batch: of one micro-batch, of all processes.
            pinned: in memory that a GPU reads itself, so that a copy to it waits for nothing.
        """
        self._pinned = pinned
        self._objective, self._samples = objective, samples_per_batch
        self._parts = samples_per_step // samples_per_batch
        self._ahead: tuple[int, StepBatches] | None = None

    def take(self, sample: int) -> StepBatches:
        """Return the batches of the step that begins with a sample."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == sample:
            return ahead[1]
        first = sample // self._samples
        parts = [self._objective.batch(first + i) for i in range(self._parts)]
        counts = [self._objective.counts(part) for part in parts]
        if self._pinned:
            parts = [_pin(part) for part in parts]
        return StepBatches(parts, torch.tensor(counts, dtype=torch.float64).sum(0))

    def prepare(self, sample: int) -> None:
        """Make the batches that the next ``take`` asks for."""
        self._ahead = (sample, self.take(sample))


def _pin(part: Any) -> Any:
    return type(part)(*(None if x is None else x.pin_memory() for x in part))
