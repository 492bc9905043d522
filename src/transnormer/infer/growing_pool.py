"""States that grow with the tokens read: one for each slot, joined for every pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from transnormer.infer.reading import evaluate
from transnormer.infer.state_pool import StatePool
from transnormer.models.cost import bytes_per_token
from transnormer.models.decoder import Decoder
from transnormer.models.state import DecoderState
from transnormer.nn.state import KVState, LayerState, map_tensors, state_bytes


class GrowingPool(StatePool):
    """A state of its own for each slot, for models whose state grows with the tokens read."""

    def __init__(self, model: Decoder, slots: int) -> None:
        super().__init__(model, slots)
        self._states = [self._empty] * slots
        self._grows = [bool(bytes_per_token(layer)) for layer in self._empty.layers]

    @property
    def nbytes(self) -> int:
        return sum(state_bytes(layer) for state in self._states for layer in state.layers)

    @torch.no_grad()
    def read(self, slots: Sequence[int]) -> DecoderState:
        states = [self._states[slot] for slot in slots]
        layers = [
            _joined([state.layers[i] for state in states]) for i in range(len(self._empty.layers))
        ]
        return DecoderState(tuple(layers), torch.cat([state.positions for state in states]))

    @torch.no_grad()
    def write(self, slots: Sequence[int], state: DecoderState) -> None:
        # Tokens lie side by side; columns that are no token's are dropped at both ends.
        spans = [(0, 0)] * len(slots)
        for layer, grows in zip(state.layers, self._grows, strict=True):
            if grows:
                spans = _spans(layer.valid)
                break
        for row, slot in enumerate(slots):
            first, length = spans[row]
            own, column = slice(row, row + 1), slice(first, first + length)
            layers = [
                _cut(layer, (own, column) if grows else (own,))
                for layer, grows in zip(state.layers, self._grows, strict=True)
            ]
            self._states[slot] = DecoderState(tuple(layers), state.positions[row : row + 1].clone())

    def decode(self, ids: Tensor, slots: Sequence[int], rows: int) -> Tensor:
        output = evaluate(self.model, ids.to(self.device), state=self.read(slots))
        assert output.state is not None
        self.write(slots, output.state)
        return output.logits


def _cut(layer: LayerState, part: tuple[slice, ...]) -> LayerState:
    """A copy of a part of a layer's state, which does not keep the whole alive."""
    return map_tensors(lambda x: x[part].clone(), layer)


def _spans(valid: Tensor) -> list[tuple[int, int]]:
    """First valid column of each row and how many there are up to the last."""
    rows, length = valid.shape
    if not length:
        return [(0, 0)] * rows
    column = torch.arange(length, device=valid.device)
    first = torch.where(valid, column, length).amin(1)
    last = torch.where(valid, column, -1).amax(1)
    return [(a, b - a + 1) if b >= 0 else (0, 0) for a, b in torch.stack([first, last], 1).tolist()]


def _joined(layers: Sequence[LayerState]) -> LayerState:
    """One state of the rows of several; caches of other lengths are padded in front."""
    first = layers[0]
    if isinstance(first, Tensor):
        return torch.cat([x for x in layers if isinstance(x, Tensor)])
    longest = 0
    if isinstance(first, KVState):
        longest = max(layer[-1].shape[1] for layer in layers)
    fields = []
    for parts in zip(*layers, strict=True):
        if isinstance(first, KVState):
            # A token's columns stay side by side when new ones follow.
            parts = [
                torch.cat([x.new_zeros(x.shape[0], longest - x.shape[1], *x.shape[2:]), x], 1)
                for x in parts
            ]
        fields.append(torch.cat(list(parts)))
    return type(first)(*fields)
