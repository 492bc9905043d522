"""What the trainer asks of processes that all hold the same model: nothing between its copies."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor, nn

from transnormer.optim import Optimizer
from transnormer.parallel.outer_config import OuterReport


class OneModel:
    """The part of a ``GradSync`` that copies with updates of their own would answer otherwise."""

    @property
    def whole_graphs(self) -> bool:
        """Whether a block compiles into one graph: nothing within it is left to the host."""
        return True

    def summed(self, values: Tensor, total: Tensor) -> Tensor:
        """Return values, float64 [n], summed over the processes whose gradients are summed.

        total is their sum over all processes.
        """
        return total

    def overall_norm(self, norm: Tensor) -> Tensor:
        """Return the gradient's norm as it is reported and judged, the same on every process."""
        return norm

    def outer_step(self, model: nn.Module, lr: float) -> OuterReport | None:
        """Let copies of the model meet, where they are due; called after every update.

        lr is the rate of that update.
        """
        return None

    def agreed(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let the parameters be those that are evaluated and exported, and then what they were."""
        return nullcontext()

    def write_own(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> Path | None:
        """Write what a checkpoint of the whole model does not hold of this process.

        Returns:
            a hidden folder inside the given one, with the files of all processes, which becomes
            part of the checkpoint; None where there is nothing to keep.
        """
        return None

    def read_own(self, model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> str | None:
        """Restore what ``write_own`` kept, after the whole model was loaded.

        Returns:
            what a reader of the run should know of it.
        """
        return None
