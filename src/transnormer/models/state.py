"""The state of a decoder: what its layers carry from token to token, and where each row stands."""

import hashlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from transnormer.files import write_atomic
from transnormer.models.fingerprint import PREFIX
from transnormer.nn.state import from_named_tensors, map_tensors, named_tensors

_FORMAT = "transnormer-state-1"


class Fingerprinted(Protocol):
    """A model that can say which one it is."""

    def fingerprint(self) -> str: ...


class DecoderState(NamedTuple):
    """States of all layers, and where each row stands.

    Attributes:
        layers: one state a layer: a recurrent one is [rows, heads, key_dim, value_dim] in float32
            (float64 for a float64 model), other mixers' are a NamedTuple of tensors (softmax's a
            ``KVState``); the first dim of each tensor is the rows.
        positions: position of the next token, int64 [rows].
    """

    layers: tuple[Any, ...]
    positions: Tensor

    def clone(self) -> Self:
        """A copy that shares nothing; gradients flow through it."""
        return self._replace(
            layers=tuple(map_tensors(Tensor.clone, x) for x in self.layers),
            positions=self.positions.clone(),
        )

    def detach(self) -> Self:
        """The same values without their history."""
        return self._replace(layers=tuple(map_tensors(Tensor.detach, x) for x in self.layers))

    def to(self, device: torch.device | str) -> Self:
        """The state on another device; its dtypes do not change.

        Raises:
            TypeError: a dtype instead of a device.
        """
        if not isinstance(device, str | torch.device):
            raise TypeError(f"device is {device!r}; expected a device; a state keeps its dtype")
        return self._replace(
            layers=tuple(map_tensors(lambda t: t.to(device), x) for x in self.layers),
            positions=self.positions.to(device),
        )

    def select(self, rows: Sequence[int] | Tensor) -> Self:
        """The state of some rows, in the order given; a row may be named more than once.

        Args:
            rows: indices from 0.

        Raises:
            TypeError: something else than integers.
            ValueError: an index outside the state.
        """
        index = torch.as_tensor(rows, device=self.positions.device)
        if index.dtype not in (torch.int64, torch.int32) and index.numel():
            raise TypeError(f"rows is {index.dtype}; expected indices, int64 or int32")
        index = index.to(torch.int64)
        count = self.positions.shape[0]
        if index.device.type == "cpu" and bool(((index < 0) | (index >= count)).any()):
            raise ValueError(f"rows is {index.tolist()}; expected indices from 0 to {count - 1}")
        return self._replace(
            layers=tuple(map_tensors(lambda t: t.index_select(0, index), x) for x in self.layers),
            positions=self.positions.index_select(0, index),
        )

    def save(self, path: str | PathLike[str], model: Fingerprinted) -> None:
        """Write the state as safetensors, with the model's fingerprint, atomically.

        Raises:
            OSError: the file cannot be written; a file that was there before is intact.
        """
        tensors: dict[str, Tensor] = {
            name: x.detach().cpu().contiguous()
            for i, layer in enumerate(self.layers)
            for name, x in named_tensors(f"layers.{i}", layer).items()
        }
        tensors["positions"] = self.positions.cpu()
        metadata = {
            "format": _FORMAT,
            "fingerprint": model.fingerprint(),
            "tokens": ",".join(str(n) for n in self.positions.tolist()),
            "sha256": _digest(tensors),
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
        if not metadata.get("fingerprint", "").startswith(PREFIX):
            raise ValueError(
                f"{path} names its model by a fingerprint of an earlier kind, which did not see every "
                f"order of weights; expected {fingerprint[:12]}; read the text again and save anew"
            )
        if metadata["fingerprint"] != fingerprint:
            raise ValueError(
                f"{path} is the state of the model {metadata['fingerprint'][:12]}; "
                f"expected {fingerprint[:12]}, the fingerprint of this model; load the model that "
                "saved it, in the same dtype"
            )
        empty = model.empty_state(0, device="meta")
        names = [
            name
            for i, layer in enumerate(empty.layers)
            for name in named_tensors(f"layers.{i}", layer)
        ]
        tokens = ",".join(str(n) for n in tensors.get("positions", torch.tensor([])).tolist())
        whole = set(tensors) == {*names, "positions"} and tokens == metadata.get("tokens")
        if not whole or _digest(tensors) != metadata.get("sha256"):
            raise ValueError(
                f"{path} does not hold what was saved (its SHA-256 or its token count differs); "
                "expected the file as it was written; save the state again"
            )
        device = next(model.parameters()).device
        layers = tuple(
            from_named_tensors(f"layers.{i}", tensors, layer)
            for i, layer in enumerate(empty.layers)
        )
        return cls(layers, tensors["positions"]).to(device)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
