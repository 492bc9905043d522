"""Where the states of running sequences live, and how the model advances them there.

A model whose state has a constant size gets slots of one pool, allocated once: no paging, no
fragmentation, and decoding works in place. A model with softmax layers keeps a state for each slot
that grows with its tokens; every pass joins those it needs, which costs a copy of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from transnormer.infer.graphs import GraphedStep
from transnormer.infer.reading import advance, evaluate
from transnormer.models.compilation import compile_blocks
from transnormer.models.cost import bytes_per_token
from transnormer.models.decoder import Block, Decoder
from transnormer.models.state import DecoderState
from transnormer.nn.state import KVState, LayerState, SlotState, map_tensors, state_bytes
from transnormer.nn.token_mixers import TokenMixer
from transnormer.ops import RingState


class StatePool(ABC):
    """States of up to ``slots`` sequences of one model.

    Args:
        model: a causal decoder.
        slots: sequences that there is room for.
        compiled: the blocks are compiled; what has no fixed shape then runs as if they were not.
    """

    def __init__(self, model: Decoder, slots: int, *, compiled: bool = False) -> None:
        self.model, self.slots = model, slots
        self.device = next(model.parameters()).device
        self._empty = model.empty_state(1)
        # What ``verify`` leaves to ``keep``: ids, slots, and the states before and after.
        self._compiled = compiled
        self._verified: tuple[Tensor, list[int], DecoderState | None, DecoderState | None] | None
        self._verified = None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the states held now."""

    @abstractmethod
    def read(self, slots: Sequence[int]) -> DecoderState:
        """A copy of the states of some slots, a row each."""

    @abstractmethod
    def write(self, slots: Sequence[int], state: DecoderState) -> None:
        """Set the states of some slots, each named once, from the rows of ``state``."""

    @abstractmethod
    def decode(self, ids: Tensor, slots: Sequence[int], rows: int) -> Tensor:
        """Advance slots by a token each: ids [n, 1] on the CPU; logits [n, 1, vocab_size].

        Runs as a batch of ``rows`` >= n rows, so that its shape does not depend on n.
        """

    def reset(self, slot: int) -> None:
        """Make a slot the start of a sequence."""
        self.write([slot], self._empty)

    def prefill(self, pieces: Sequence[Tensor], slots: Sequence[int]) -> Tensor:
        """Read the next tokens of slots in one packed call.

        Args:
            pieces: ids [tokens] for each slot, on the CPU, of any lengths.
            slots: which sequences they continue.

        Returns:
            logits after the last token of each, [n, vocab_size].
        """
        state = self.read(slots)
        packed = torch.cat(list(pieces))[None].to(self.device)
        bounds: Tensor | None = None
        if len(pieces) > 1:
            bounds = torch.tensor([0, *map(len, pieces)]).cumsum(0).to(self.device)
        with self._plain():
            logits, state = advance(self.model, packed, state, cu_seqlens=bounds)
        self.write(slots, state)
        return logits

    def _plain(self) -> AbstractContextManager[Any]:
        """Within it blocks run uncompiled: each new length would be compiled anew."""
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    def verify(self, ids: Tensor, slots: Sequence[int], rows: int) -> Tensor:
        """Logits after each of several tokens of slots, of which ``keep`` then keeps the first.

        Args:
            ids: [n, tokens] on the CPU.
            slots: n sequences.
            rows: of the batch, as ``decode``'s.

        Returns:
            logits [n, tokens, vocab_size].
        """
        before = self.read(slots)
        with self._plain():
            output = evaluate(self.model, ids.to(self.device), state=before)
        self._verified = (ids, list(slots), before, output.state)
        return output.logits

    def keep(self, counts: Sequence[int]) -> None:
        """Keep the first ``counts`` tokens of each row of the last ``verify``, and no others."""
        assert self._verified is not None
        (ids, slots, before, after), self._verified = self._verified, None
        assert after is not None
        tokens = ids.shape[1]
        if min(counts) < tokens:
            # Tokens cannot be taken out of a sum: the snapshot reads again those that stay.
            mask = torch.arange(tokens) < torch.tensor(counts)[:, None]
            with self._plain():
                _, after = advance(
                    self.model, ids.to(self.device), before, mask=mask.to(self.device)
                )
        self.write(slots, after)


class FixedPool(StatePool):
    """States of constant size, allocated once; decoding advances them in place.

    Args:
        model: a causal decoder without growing states.
        slots: sequences that there is room for.
        ring: entries of the rings beside the states of layers with constant decay (see
            ``RingState``), so that a state is seldom written and tokens can be taken back; None
            has no rings.
        compiled: as ``StatePool``'s.
    """

    def __init__(
        self, model: Decoder, slots: int, *, ring: int | None = None, compiled: bool = False
    ) -> None:
        super().__init__(model, slots, compiled=compiled)
        self._mixers = _mixers(model)
        self._dtype = model.embedding.weight.dtype
        # The row after the last slot takes what the rows of a batch that are not real write.
        pool = model.empty_state(slots + 1)
        self._spare = torch.tensor([slots], device=self.device)
        self.positions = pool.positions
        self.layers: list[LayerState] = [
            RingState.from_state(layer, capacity=ring, dtype=self._dtype)
            if ring is not None and mixer.steps_in_slots
            else layer
            for mixer, layer in zip(self._mixers, pool.layers, strict=True)
        ]
        self._step = GraphedStep(self._advance, self.device)

    @property
    def nbytes(self) -> int:
        return sum(map(state_bytes, self.layers)) + self.positions.nbytes

    @property
    def rolls_back(self) -> bool:
        """Whether every layer has a ring, so that tokens are taken back without reading again."""
        return all(isinstance(layer, RingState) for layer in self.layers)

    def _index(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor(list(slots), dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def read(self, slots: Sequence[int]) -> DecoderState:
        index = self._index(slots)
        layers = []
        for mixer, layer in zip(self._mixers, self.layers, strict=True):
            if isinstance(layer, RingState):
                layers.append(layer.fold(mixer.log_decay(self._dtype), index))
            else:
                layers.append(map_tensors(lambda x: x.index_select(0, index), layer))
        return DecoderState(tuple(layers), self.positions.index_select(0, index))

    @torch.no_grad()
    def write(self, slots: Sequence[int], state: DecoderState) -> None:
        self._write(self._index(slots), state)

    def _write(self, index: Tensor, state: DecoderState) -> None:
        for layer, new in zip(self.layers, state.layers, strict=True):
            if isinstance(new, SlotState):
                continue
            if isinstance(layer, RingState):
                layer.state.index_copy_(0, index, new)
                layer.length.index_fill_(0, index, 0)
                layer.start.index_fill_(0, index, 0)
            elif isinstance(layer, Tensor):
                layer.index_copy_(0, index, new)
            else:
                for x, y in zip(layer, new, strict=True):
                    x.index_copy_(0, index, y)
        self.positions.index_copy_(0, index, state.positions)

    def decode(self, ids: Tensor, slots: Sequence[int], rows: int) -> Tensor:
        padded = torch.zeros(rows, ids.shape[1], dtype=torch.int64)
        padded[: len(slots)] = ids
        places = torch.full((rows,), -1, dtype=torch.int32)
        places[: len(slots)] = torch.tensor(list(slots), dtype=torch.int32)
        return self._step(padded, places)[: len(slots)]

    def verify(self, ids: Tensor, slots: Sequence[int], rows: int) -> Tensor:
        if not self.rolls_back:
            return super().verify(ids, slots, rows)
        self._verified = (ids, list(slots), None, None)
        return self.decode(ids, slots, rows)

    def keep(self, counts: Sequence[int]) -> None:
        if not self.rolls_back:
            super().keep(counts)
            return
        assert self._verified is not None
        (ids, slots, _, _), self._verified = self._verified, None
        dropped = ids.shape[1] - torch.tensor(list(counts), dtype=torch.int64)
        self.roll_back(slots, dropped.tolist())

    @torch.no_grad()
    def roll_back(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Take back the last tokens of some slots, at most what their rings hold.

        Raises:
            ValueError: (on a CPU) more tokens than a ring holds; at least half of its entries can
                always be taken back.
            NotImplementedError: a pool with layers without rings.
        """
        if not self.rolls_back:
            raise NotImplementedError("a layer has no ring; expected ring=16 and constant decay")
        index = self._index(slots)
        dropped = torch.tensor(list(tokens), dtype=torch.int64, device=self.device)
        for layer in self.layers:
            assert isinstance(layer, RingState)
            layer.roll_back(dropped, index)
        self.positions.index_add_(0, index, -dropped)

    def _advance(self, ids: Tensor, slots: Tensor) -> Tensor:
        """One step over slots, -1 for rows that are not real; logits [rows, tokens, vocab_size]."""
        index = torch.where(slots < 0, self.slots, slots).to(torch.int64)
        layers = []
        for mixer, layer in zip(self._mixers, self.layers, strict=True):
            if mixer.steps_in_slots:
                assert isinstance(layer, Tensor | RingState)
                layers.append(SlotState(layer, slots))
            else:
                layers.append(map_tensors(lambda x: x.index_select(0, index), layer))
        state = DecoderState(tuple(layers), self.positions.index_select(0, index))
        output = evaluate(self.model, ids, state=state)
        assert output.state is not None
        with torch.no_grad():
            self._write(index, output.state)
            # The spare row must not count on, nor grow, for as long as the pool lives.
            kept = zip(layers, self._empty.layers, strict=True)
            empty = tuple(x if isinstance(x, SlotState) else y for x, y in kept)
            self._write(self._spare, DecoderState(empty, self._empty.positions))
        return output.logits


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


def _mixers(model: Decoder) -> list[TokenMixer]:
    """The token mixers of the blocks, in order."""
    return [block.token_mixer for block in model.blocks if isinstance(block, Block)]


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


def make_pool(
    model: Decoder, slots: int, *, ring: int | None = None, compiled: bool = False
) -> StatePool:
    """The pool that a model's state needs.

    Args:
        model: a causal decoder.
        slots: sequences that there is room for.
        ring: as ``FixedPool``'s.
        compiled: compile the model's blocks for decoding, in place.

    Raises:
        NotImplementedError: rings for a model without layers of constant decay; rings or
            compilation for one with a state that grows.
    """
    empty = model.empty_state(0, device="meta")
    grows = any(bytes_per_token(layer) for layer in empty.layers)
    steps = any(mixer.steps_in_slots for mixer in _mixers(model))
    if ring is not None and (grows or not steps):
        why = "its state grows" if grows else "no layer has constant decay"
        raise NotImplementedError(f"ring is {ring}; expected None for this model, since {why}")
    if compiled and grows:
        raise NotImplementedError(
            "compile is True; expected False for this model, whose state has another shape each step"
        )
    if compiled:
        compile_blocks(model)
    if grows:
        return GrowingPool(model, slots)
    return FixedPool(model, slots, ring=ring, compiled=compiled)
