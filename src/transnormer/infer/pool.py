"""Where the states of running sequences live, and how the model advances them there.

A model whose state has a constant size gets slots of one pool, allocated once: no paging, no
fragmentation, and decoding works in place. A model with softmax layers keeps a state for each slot
that grows with its tokens; every pass joins those it needs, which costs a copy of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from transnormer.infer.cpu_step import CpuStep
from transnormer.infer.fused import FusedStep, likeliest
from transnormer.infer.graphs import GraphedStep, StepOutput
from transnormer.infer.growing_pool import GrowingPool
from transnormer.infer.reading import evaluate
from transnormer.infer.state_pool import StatePool
from transnormer.models.compilation import compile_blocks
from transnormer.models.cost import bytes_per_token
from transnormer.models.decoder import Block, Decoder
from transnormer.models.state import DecoderState
from transnormer.nn.state import LayerState, SlotState, map_tensors, state_bytes
from transnormer.nn.token_mixers import TokenMixer
from transnormer.ops import RingState, decode


class FixedPool(StatePool):
    """States of constant size, allocated once; decoding advances them in place.

    Args:
        model: a causal decoder without growing states.
        slots: sequences that there is room for.
        ring: entries of the rings beside the states of layers with constant decay (see
            ``RingState``), so that a state is seldom written and tokens can be taken back; None
            has no rings.
        compiled: as ``StatePool``'s.
        fused: decode by the kernels of ``FusedStep``, on a CPU by ``CpuStep`` (by the kernels too in
            Triton's interpreter); prompts are read by the model.
        draw_below: ids from here on are never the likeliest.
    """

    def __init__(
        self,
        model: Decoder,
        slots: int,
        *,
        ring: int | None = None,
        compiled: bool = False,
        fused: bool = False,
        draw_below: int | None = None,
    ) -> None:
        super().__init__(model, slots, compiled=compiled)
        self._fused = _fused_step(model) if fused else None
        self._limit = draw_below
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
        self.step = GraphedStep(self._advance, self.device)

    @property
    def nbytes(self) -> int:
        return sum(map(state_bytes, self.layers)) + self.positions.nbytes

    @property
    def runs_ahead(self) -> bool:
        return True

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
        padded = torch.zeros(rows, ids.shape[1], dtype=torch.int64, device=ids.device)
        padded[: len(slots)] = ids
        places = torch.full((rows,), -1, dtype=torch.int32)
        places[: len(slots)] = torch.tensor(list(slots), dtype=torch.int32)
        logits, best = self.step(padded, places)
        self.likeliest = None if best is None else best[:, : len(slots)]
        return logits[: len(slots)]

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

    def _advance(self, ids: Tensor, slots: Tensor) -> StepOutput:
        """One step over slots, -1 for rows that are not real."""
        if self._fused is None:
            logits = self._advance_by_model(ids, slots)
        else:
            logits = self._fused(ids, slots, self.positions, self.layers)
        return StepOutput(logits, likeliest(logits, self._limit))

    def _advance_by_model(self, ids: Tensor, slots: Tensor) -> Tensor:
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


def _fused_step(model: Decoder) -> FusedStep | CpuStep:
    """The step that stands in for the model where it is."""
    device = model.embedding.weight.device
    if device.type == "cpu" and decode.why_not(device) is not None:
        return CpuStep(model)
    return FusedStep(model)


def _mixers(model: Decoder) -> list[TokenMixer]:
    """The token mixers of the blocks, in order."""
    return [block.token_mixer for block in model.blocks if isinstance(block, Block)]


def make_pool(
    model: Decoder,
    slots: int,
    *,
    ring: int | None = None,
    compiled: bool = False,
    fused: bool = False,
    draw_below: int | None = None,
) -> StatePool:
    """The pool that a model's state needs.

    Args:
        model: a causal decoder.
        slots: sequences that there is room for.
        ring, fused, draw_below: as ``FixedPool``'s.
        compiled: compile the model's blocks for decoding, in place.

    Raises:
        NotImplementedError: rings for a model without layers of constant decay; rings, compilation
            or fused steps for one with a state that grows; what ``FusedStep`` or ``CpuStep`` refuses.
        RuntimeError: fused steps on a device that is no CPU and that Triton does not run on.
    """
    empty = model.empty_state(0, device="meta")
    grows = any(bytes_per_token(layer) for layer in empty.layers)
    steps = any(mixer.steps_in_slots for mixer in _mixers(model))
    if ring is not None and (grows or not steps):
        why = "its state grows" if grows else "no layer has constant decay"
        raise NotImplementedError(f"ring is {ring}; expected None for this model, since {why}")
    for name, value in (("compile", compiled), ("fused", fused)):
        if value and grows:
            raise NotImplementedError(
                f"{name} is True; expected False for this model, whose state has another shape each "
                "step"
            )
    if compiled:
        compile_blocks(model)
    if grows:
        return GrowingPool(model, slots)
    return FixedPool(model, slots, ring=ring, compiled=compiled, fused=fused, draw_below=draw_below)
