"""The recurrent state of a decoder: constant size, whatever the number of tokens behind it."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from transnormer.files import write_atomic

_FORMAT = "transnormer-state-1"


class Fingerprinted(Protocol):
    """A model that can say which one it is."""

    def fingerprint(self) -> str: ...


class DecoderState(NamedTuple):
    """States of all layers, and where each row stands.

    Attributes:
        layers: one state a layer, [rows, heads, key_dim, value_dim] float32 (float64 for a float64
            model).
        positions: position of the next token, int64 [rows].
    """

    layers: tuple[Tensor, ...]
    positions: Tensor

    def clone(self) -> Self:
        """A copy that shares nothing; gradients flow through it."""
        return self._replace(
            layers=tuple(x.clone() for x in self.layers), positions=self.positions.clone()
        )

    def detach(self) -> Self:
        """The same values without their history."""
        return self._replace(layers=tuple(x.detach() for x in self.layers))

    def to(self, device: torch.device | str) -> Self:
        """The state on another device; its dtypes do not change."""
        return self._replace(
            layers=tuple(x.to(device) for x in self.layers), positions=self.positions.to(device)
        )

    def select(self, rows: Sequence[int] | Tensor) -> Self:
        """The state of some rows, in the order given; a row may be named more than once."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.positions.device)
        return self._replace(
            layers=tuple(x.index_select(0, index) for x in self.layers),
            positions=self.positions.index_select(0, index),
        )

    def save(self, path: str | PathLike[str], model: Fingerprinted) -> None:
        """Write the state as safetensors, with the model's fingerprint, atomically.

        Raises:
            OSError: the file cannot be written; a file that was there before is intact.
        """
        tensors: dict[str, Tensor] = {
            f"layers.{i}": x.detach().cpu().contiguous() for i, x in enumerate(self.layers)
        }
        tensors["positions"] = self.positions.cpu()
        metadata = {
            "format": _FORMAT,
            "fingerprint": model.fingerprint(),
            "tokens": ",".join(str(n) for n in self.positions.tolist()),
        }
        write_atomic(Path(path), serialize(tensors, metadata))

    @classmethod
    def load(cls, path: str | PathLike[str], model: Any) -> Self:
        """Read a state that ``model`` saved, onto the model's device.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a state, damaged, or the state of another model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"state file {path} does not exist")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable state file ({error})") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a saved state; expected format {_FORMAT}")
        fingerprint = model.fingerprint()
        if metadata.get("fingerprint") != fingerprint:
            raise ValueError(
                f"{path} is the state of the model {metadata.get('fingerprint', '?')[:12]}; "
                f"expected {fingerprint[:12]}, the fingerprint of this model; load the model that "
                "saved it, in the same dtype"
            )
        names = [f"layers.{i}" for i in range(len(tensors) - 1)]
        if set(tensors) != {*names, "positions"}:
            raise ValueError(
                f"{path} holds {', '.join(sorted(tensors))}; expected layers.0 to layers.n and "
                "positions; the file is damaged"
            )
        layers = tuple(tensors[name] for name in names)
        device = next(model.parameters()).device
        return cls(layers, tensors["positions"]).to(device)
