"""How several processes train one model: the hooks that the trainer calls, and one process."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from transnormer.models.checkpoint import AnyModel
from transnormer.optim import Optimizer, WholeMatrices, gradient_norm
from transnormer.parallel.host_copies import HostCopies
from transnormer.parallel.one_model import OneModel
from transnormer.parallel.outer_config import OuterReport
from transnormer.train.staging import StagedModel

ModelT = TypeVar("ModelT", bound=AnyModel)
T = TypeVar("T")


class Staged(Protocol):
    """A model and an optimizer's state as they were when they were taken."""

    def write(self, folder: Path, *, tokenizer_fingerprint: str | None) -> None:
        """Write weights, config.json and the optimizer's state; all processes call it.

        Raises OSError on all processes where one cannot write.
        """
        ...

    def from_first(self, make: Callable[[], T]) -> T:
        """As GradSync's; this one may be called beside the training."""
        ...


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

    @property
    def whole_graphs(self) -> bool:
        """Whether a block compiles into one graph; see OneModel."""
        ...

    def wrap(self, model: ModelT, values: Iterable[Mapping[str, Tensor]] | None = None) -> ModelT:
        """Prepare the model, once, before its optimizer is built.

        Values are those of a model on the meta device, which several processes begin with.
        """
        ...

    def total(self, values: Tensor) -> Tensor:
        """Return values, float64 [n] on any device, summed over all processes."""
        ...

    def matrices(self) -> WholeMatrices | None:
        """How these processes work on whole matrices; None where each holds whole ones."""
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

    def whole(
        self, model: AnyModel, optimizer: Optimizer
    ) -> tuple[AnyModel, Mapping[str, Tensor]] | None:
        """Return the model of one process and its optimizer's state; None but on the first."""
        ...

    def stage(self, model: AnyModel, optimizer: Optimizer, copies: HostCopies | None) -> Staged:
        """Take what this process holds, to be written as a checkpoint; all processes call it.

        With copies it is copied there, and may change while it is written.
        """
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

    def summed(self, values: Tensor, total: Tensor) -> Tensor:
        """Return values summed over the processes whose gradients are summed; see OneModel."""
        ...

    def overall_norm(self, norm: Tensor) -> Tensor:
        """Return the gradient's norm as it is reported and judged; see OneModel."""
        ...

    def outer_step(self, model: AnyModel, lr: float) -> OuterReport | None:
        """Let copies of the model meet, where they are due; see OneModel."""
        ...

    def agreed(self, model: AnyModel) -> AbstractContextManager[None]:
        """Let the parameters be those that are evaluated and exported; see OneModel."""
        ...

    def write_own(self, model: AnyModel, optimizer: Optimizer, folder: Path) -> Path | None:
        """Write what only this process holds; see OneModel."""
        ...

    def read_own(self, model: AnyModel, optimizer: Optimizer, checkpoint: Path) -> str | None:
        """Restore what ``write_own`` kept; see OneModel."""
        ...

    def from_first(self, make: Callable[[], T]) -> T:
        """Call a function on the first process; return or raise on all what it did there."""
        ...

    def highest(self, value: int) -> int:
        """Return the largest of all processes' values."""
        ...


class OneProcess(OneModel):
    """A GradSync of one process alone."""

    rank = 0
    world_size = 1
    process = 0
    devices = 1
    is_first = True

    def wrap(self, model: ModelT, values: Iterable[Mapping[str, Tensor]] | None = None) -> ModelT:
        """Return the model as it is: that of one process has its values."""
        return model

    def total(self, values: Tensor) -> Tensor:
        """Return the values: there is nobody else."""
        return values

    def matrices(self) -> WholeMatrices | None:
        """None: they are whole."""
        return None

    def after_backward(self, model: AnyModel) -> None:
        """Leave the gradients."""

    def after_step(self, model: AnyModel, step: int) -> None:
        """Leave the parameters."""

    def total_norm(self, model: AnyModel) -> Tensor:
        """Return the norm of the gradient."""
        return gradient_norm(p.grad for p in model.parameters() if p.grad is not None)

    def whole(self, model: AnyModel, optimizer: Optimizer) -> tuple[AnyModel, Mapping[str, Tensor]]:
        """Return what there is."""
        return model, optimizer.state_tensors()

    def stage(
        self, model: AnyModel, optimizer: Optimizer, copies: HostCopies | None
    ) -> StagedModel:
        """Take the whole model and all states."""
        return StagedModel(model, optimizer, copies)

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
