"""What one process takes of a model and its optimizer at one moment, to be written as a checkpoint."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from transnormer.models import checkpoint, tensor_files
from transnormer.optim import Optimizer
from transnormer.parallel.host_copies import HostCopies
from transnormer.train.adapters import open_weights, read_weights, write_model

T = TypeVar("T")
OPTIMIZER = "optimizer"


class StagedModel:
    """A model and an optimizer's state, live or copied to the host."""

    def __init__(
        self, model: checkpoint.AnyModel, optimizer: Optimizer, copies: HostCopies | None
    ) -> None:
        """Take them.

        Args:
            model: of one process, with adapters or without.
            optimizer: of its parameters.
            copies: where to copy all tensors to; None leaves them where they are.
        """
        self._copies = copies
        self._model, self._states = model, optimizer.state_tensors()
        if copies is not None:
            named = [*model.named_parameters(), *model.named_buffers()]
            states = {f"{OPTIMIZER}/{name}": x for name, x in self._states.items()}
            taken = copies.take({f"model/{name}": x for name, x in named} | states)
            self._model = _around(model, {id(x): taken[f"model/{name}"] for name, x in named})
            self._states = {name: taken[f"{OPTIMIZER}/{name}"] for name in self._states}

    def write(self, folder: Path, *, tokenizer_fingerprint: str | None) -> None:
        """Write weights, config.json and the optimizer's state into a directory that exists.

        Raises:
            OSError: the disk refuses.
        """
        if self._copies is not None:
            self._copies.wait()
        write_model(self._model, folder, tokenizer_fingerprint=tokenizer_fingerprint)
        host = {name: x.detach().cpu() for name, x in self._states.items()}
        tensor_files.write_tensors(host, folder, stem=OPTIMIZER)

    def from_first(self, make: Callable[[], T]) -> T:
        """Call the function."""
        return make()


def _around(model: checkpoint.AnyModel, copies: Mapping[int, Tensor]) -> checkpoint.AnyModel:
    """The same modules around copies of all tensors, which are given by the tensors' ids."""
    known: dict[int, object] = dict(copies)
    for x in model.parameters():
        known[id(x)] = nn.Parameter(copies[id(x)], requires_grad=x.requires_grad)
    return copy.deepcopy(model, known)


def read_step(
    path: Path, base: Path, device: torch.device, *, whole: bool
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """What a step holds of the model that wrote it, and of its optimizer, by parameter name and key.

    Args:
        path: the step.
        base: where the frozen weights are, for a model with adapters.
        device: for the weights.
        whole: read all of it; False gives tensors that are read when they are sliced.

    Raises:
        FileNotFoundError, ValueError: as ``checkpoint.load_any``.
    """
    states: Mapping[str, Any] = tensor_files.open_tensors(path, OPTIMIZER)
    if not whole:
        return open_weights(path, base), states
    # Copied into the fresh model: where a tensor lies in memory can change the last bit of a product,
    # and a run from step 0 has its weights in memory of this kind.
    return read_weights(path, base, device=device), {name: states[name][...] for name in states}
