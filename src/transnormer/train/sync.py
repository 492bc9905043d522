"""How several processes train one model: the hooks that the trainer calls, and one process."""

from typing import Protocol, TypeVar

from torch import Tensor

from transnormer.models.checkpoint import AnyModel

ModelT = TypeVar("ModelT", bound=AnyModel)


class GradSync(Protocol):
    """What a strategy does around one process's forward and backward passes.

    The trainer divides the summed loss by the valid labels of all processes, so gradients are
    summed, never averaged, over processes; uneven batches then weigh by their tokens.

    Attributes:
        rank, world_size: which rows of every global batch this process takes.
    """

    rank: int
    world_size: int

    def wrap(self, model: ModelT) -> ModelT:
        """Prepare the model, once, before its optimizer is built."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """Return values, float64 [n], summed over all processes."""
        ...

    def after_backward(self, model: AnyModel) -> None:
        """Make the gradients the sums over all processes, once a step."""
        ...

    def after_step(self, model: AnyModel, step: int) -> None:
        """Act on the updated parameters after update number `step` (from 1)."""
        ...


class OneProcess:
    """A GradSync of one process alone."""

    rank = 0
    world_size = 1

    def wrap(self, model: ModelT) -> ModelT:
        """Return the model as it is."""
        return model

    def total(self, values: Tensor) -> Tensor:
        """Return the values: there is nobody else."""
        return values

    def after_backward(self, model: AnyModel) -> None:
        """Leave the gradients."""

    def after_step(self, model: AnyModel, step: int) -> None:
        """Leave the parameters."""
