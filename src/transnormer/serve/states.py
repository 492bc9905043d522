"""States of conversations that clients go on from, fork, save and load."""

import secrets
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.infer.prefix_cache import snapshot_bytes
from transnormer.models.decoder import Decoder
from transnormer.models.state import DecoderState
from transnormer.nn.state import tensors_of
from transnormer.serve.errors import ApiError, Reply

# Positions from here on are no exact numbers in float64, nor far from the end of int64.
_MAX_TOKENS = 2**53


class StateInfo(Reply):
    """A state that the server keeps."""

    id: str
    """Goes into the field ``state`` of a request, any number of times."""
    object: str
    tokens: int
    """Tokens that it has read."""
    bytes: int
    """Its size, which does not grow with the tokens of a recurrent model."""
    last_token: int | None
    """The last of its tokens, where that is known."""


class StateDeleted(Reply):
    """The answer to a state's removal."""

    id: str
    object: str
    deleted: bool


class Kept(NamedTuple):
    """A state on the CPU, and the last token it has read."""

    state: DecoderState
    last_token: int | None


class StateStore:
    """The states that clients have asked to keep; those used least recently leave when it is full.

    A state never changes, so whoever goes on from it gets a new one: a fork is two requests with
    one id. Ids cannot be guessed; who knows one may use it.

    Args:
        max_bytes: of all states.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._states: OrderedDict[str, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def put(self, kept: Kept) -> StateInfo:
        """Keep a state.

        Raises:
            ApiError: it alone is larger than all the room.
        """
        size = snapshot_bytes(kept.state)
        if size > self.max_bytes:
            raise ApiError(
                507,
                f"the state has {size} bytes; expected at most {self.max_bytes}; start the server "
                "with more room for states",
                code="state_too_large",
            )
        while self.nbytes + size > self.max_bytes:
            _, old = self._states.popitem(last=False)
            self.nbytes -= snapshot_bytes(old.state)
        name = f"state-{secrets.token_urlsafe(18)}"
        self._states[name] = kept
        self.nbytes += size
        return self.info(name)

    def get(self, name: str) -> Kept:
        """A state by its id.

        Raises:
            ApiError: there is none.
        """
        if name not in self._states:
            raise ApiError(
                404,
                f"there is no state {name[:80]!r}; it may have left for newer ones; send the whole "
                "conversation instead",
                param="state",
                code="state_not_found",
            )
        self._states.move_to_end(name)
        return self._states[name]

    def info(self, name: str) -> StateInfo:
        """What a client is told about a state; raises ApiError where there is none."""
        kept = self.get(name)
        return StateInfo(
            id=name,
            object="state",
            tokens=int(kept.state.positions[0]),
            bytes=snapshot_bytes(kept.state),
            last_token=kept.last_token,
        )

    def delete(self, name: str) -> StateDeleted:
        """Forget a state; raises ApiError where there is none."""
        self.get(name)
        self.nbytes -= snapshot_bytes(self._states.pop(name).state)
        return StateDeleted(id=name, object="state", deleted=True)


class _Described:
    """What ``DecoderState`` asks of a model, without the model: its weights may be on a GPU that the
    engine's thread alone speaks to."""

    def __init__(self, model: Decoder) -> None:
        self._fingerprint, self._model = model.fingerprint(), model

    def fingerprint(self) -> str:
        return self._fingerprint

    def empty_state(self, rows: int, device: str) -> DecoderState:
        return self._model.empty_state(rows, device=device)

    def parameters(self) -> Iterator[Tensor]:
        return iter([torch.empty(0)])


class StateFiles:
    """Reads and writes states as files of ``DecoderState``, all on the CPU.

    Args:
        model: whose states they are.
    """

    def __init__(self, model: Decoder) -> None:
        self._model = _Described(model)

    def write(self, kept: Kept) -> bytes:
        """A state as the bytes of ``DecoderState.save``."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            kept.state.save(path, self._model)
            return path.read_bytes()

    def read(self, data: bytes, last_token: int | None) -> Kept:
        """A state from the bytes of a file.

        Raises:
            ApiError: no state, one of another model, of several rows, with NaN, or with a count of
                tokens that cannot be.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            path.write_bytes(data)
            try:
                state = DecoderState.load(path, self._model)
            except ValueError as error:
                message = str(error).replace(str(path), "the body")
                raise ApiError(400, message, code="invalid_state") from error
        if state.positions.shape != (1,):
            raise ApiError(400, f"the state has {len(state.positions)} rows; expected one")
        if not 0 <= int(state.positions[0]) < _MAX_TOKENS:
            raise ApiError(
                400,
                f"the state has read {int(state.positions[0])} tokens; expected at least 0 and less "
                f"than {_MAX_TOKENS}",
                code="invalid_state",
            )
        finite = [x.isfinite().all() for layer in state.layers for x in tensors_of(layer)]
        if not bool(torch.stack(finite).all()):
            raise ApiError(400, "the state holds NaN or infinity; expected finite numbers")
        return Kept(state, last_token)
