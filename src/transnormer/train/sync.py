"""How several processes train one model: the hooks that the trainer calls, and one process."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from transnormer.models.checkpoint import AnyModel
from transnormer.optim import Optimizer

ModelT = TypeVar("ModelT", bound=AnyModel)
T = TypeVar("T")


class GradSync(Protocol):
    """What a strategy does around one process's forward and backward passes.

    The trainer divides the summed loss by the valid labels of all processes, so gradients are
    summed, never averaged, over processes; uneven batches then weigh by their tokens.

    Attributes:
        rank, world_size: which rows of every global batch this process takes.
        process: number of this process's random numbers, from 0.
        devices: processes in all.
        is_first: whether this process writes the run directory and tells of the run.
    """

    rank: int
    world_size: int
    process: int
    devices: int
    is_first: bool

    def wrap(self, model: ModelT) -> ModelT:
        """Prepare the model, once, before its optimizer is built."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """Return values, float64 [n] on any device, summed over all processes."""
        ...

    def after_backward(self, model: AnyModel) -> None:
        """Make the gradients the sums over all processes, once a step."""
        ...

    def after_step(self, model: AnyModel, step: int) -> None:
        """Act on the updated parameters after update number `step` (from 1)."""
        ...

    def total_norm(self, model: AnyModel) -> Tensor:
        """Return the norm of the whole gradient, the same on every process."""
        ...

    def clip(self, model: AnyModel, most: float, norm: Tensor) -> None:
        """Scale the gradient, whose norm is given, down to a norm of at most `most`."""
        ...

    def whole(
        self, model: AnyModel, optimizer: Optimizer
    ) -> tuple[AnyModel, Mapping[str, Tensor]] | None:
        """Return the model of one process and its optimizer's state; None but on the first."""
        ...

    def load(
        self,
        model: AnyModel,
        optimizer: Optimizer,
        weights: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
    ) -> None:
        """Copy whole weights and an optimizer's whole state into this process's shares."""
        ...

    def from_first(self, make: Callable[[], T]) -> T:
        """Call a function on the first process; return or raise on all what it did there."""
        ...

    def highest(self, value: int) -> int:
        """Return the largest of all processes' values."""
        ...


class OneProcess:
    """A GradSync of one process alone."""

    rank = 0
    world_size = 1
    process = 0
    devices = 1
    is_first = True

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

    def total_norm(self, model: AnyModel) -> Tensor:
        """Return the norm of the gradient."""
        return get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    def clip(self, model: AnyModel, most: float, norm: Tensor) -> None:
        """Scale the gradient down to a norm of at most `most`."""
        clip_grads_with_norm_(model.parameters(), most, norm)

    def whole(self, model: AnyModel, optimizer: Optimizer) -> tuple[AnyModel, Mapping[str, Tensor]]:
        """Return what there is."""
        return model, optimizer.state_tensors()

    def load(
        self,
        model: AnyModel,
        optimizer: Optimizer,
        weights: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
    ) -> None:
        """Copy weights and states."""
        model.load_state_dict(weights)
        optimizer.load_state_tensors(states)

    def from_first(self, make: Callable[[], T]) -> T:
        """Call the function."""
        return make()

    def highest(self, value: int) -> int:
        """Return the value."""
        return value
