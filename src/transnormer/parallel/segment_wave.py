"""Sequences of any length on several ranks, segment by segment: a wave along the layers.

Segment i of a row belongs to rank i mod P. Layer l of segment i needs layer l - 1 of the same segment
and the state of layer l behind segment i - 1, and nothing else; so rank r + 1 is at work on layer l - 1
of the next segment while rank r is at work on layer l of its own, and what passes between them is one
layer's state at a time. With N layers and S segments a rank waits for P - 1 layers in a pass over
N S / P: parts of equal size that lay one behind the other would be computed one after the other, since
the first segment of a part needs what the whole part before leaves in every layer.

As on one process (``models.segments``) the first pass keeps the state at the start of each segment
alone, and the second takes the segments from the last to the first, computes each again with its graph
and passes the gradient of the state at its start on, layer by layer, to the rank of the segment
before. Gradients are those of the whole sequence.
"""

import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from transnormer.models.decoder import Block, Decoder
from transnormer.models.random_state import (
    drops_in_training,
    random_state,
    set_random_state,
)
from transnormer.models.segments import Context, Segment, plan_segments, read_segment
from transnormer.models.state import DecoderState
from transnormer.nn.state import LayerState, map_tensors, tensors_of
from transnormer.parallel.fsdp import hold_whole, share_out
from transnormer.parallel.relay import differentiable, plain
from transnormer.parallel.state_exchange import Chain
from transnormer.parallel.tensor_layers import mix_in


class _Turn(NamedTuple):
    """One segment's pass.

    Attributes:
        enters: its rows (packed: its first one) go on from the segment before.
        leaves: its rows (packed: its last one) go on in the segment behind.
        packed: whether the row holds packed sequences.
        again: the second pass, whose states at the start are known and whose gradients pass.
        kept: the state at the start of each layer, of the rows that go on; filled by the first pass.
    """

    enters: bool
    leaves: bool
    packed: bool
    again: bool
    kept: list[LayerState]


class SegmentWave:
    """What the blocks of one rank hand to the rank of the next segment, and get from that before.

    On one rank the messages stay in its memory. Those of GPUs pass through their hosts: a message of
    NCCL is a kernel that waits on the device for the other rank's, the ranks are at different layers,
    and a kernel that is launched for the first time may wait until the device is idle.

    Attributes:
        turn: the segment under way; None is a call that has nothing to do with segments.
    """

    def __init__(self, chain: Chain, messages: dist.ProcessGroup | None) -> None:
        self.chain, self._messages = chain, messages
        self.turn: _Turn | None = None
        self.depth = 1
        self._here: deque[Tensor] = deque()
        self._under_way: deque[tuple[dist.Work | None, Tensor]] = deque()

    def enter(self, x: Tensor, state: LayerState, layer: int) -> tuple[Tensor, LayerState]:
        """The input of a block, and its state with the rows that go on."""
        turn = self.turn
        assert turn is not None
        if not turn.enters:
            return x, state
        if not turn.again:
            rows = 1 if turn.packed else x.shape[0]
            turn.kept.append(self.receive_state(map_tensors(lambda t: t[:rows], state)))
        arrived = tensors_of(turn.kept[layer])
        if turn.again:
            x, *arrived = _Enter.apply(self, x, *map(_wanting, arrived))
        left = iter(arrived)

        def with_arrived(t: Tensor) -> Tensor:
            first = next(left)
            return first if first.shape == t.shape else torch.cat([first, t[first.shape[0] :]])

        return x, map_tensors(with_arrived, state)

    def leave(self, y: Tensor, state: LayerState, entered: LayerState) -> Tensor:
        """The output of a block, on the way to the loss; its state goes to the next segment.

        In the dtypes that the state had when it entered, which the next rank waits for: under
        autocast a layer may leave another one.
        """
        turn = self.turn
        assert turn is not None
        if not turn.leaves:
            return y
        last = slice(-1, None) if turn.packed else slice(None)
        pairs = zip(tensors_of(state), tensors_of(entered), strict=True)
        tensors = tuple(t[last].to(like.dtype) for t, like in pairs)
        if turn.again:
            return _Leave.apply(self, _wanting(y), *tensors)
        self.send(tensors, 1)
        return y

    def receive_state(self, like: LayerState) -> LayerState:
        """A layer's state from the segment before, in the shape and the dtypes of ``like``."""
        arrived = iter(self.receive(tensors_of(like), -1))
        return map_tensors(lambda _: next(arrived), like)

    def send(self, tensors: Sequence[Tensor], step: int) -> None:
        """Send tensors to the rank of the next segment (step 1) or of the one before (-1).

        They must not change any more. Nothing waits for the other rank: this one is many layers ahead
        before its message is wanted.
        """
        chain = self.chain
        for x in tensors:
            if chain.size == 1:
                self._here.append(x)
                continue
            message = plain(_on_host(x.contiguous()))
            peer = (chain.rank + step) % chain.size
            work = dist.isend(message, group=self._messages, group_dst=peer)
            self._under_way.append((work, message))
        # Those of the segment before the last one have long been taken.
        while len(self._under_way) > 2 * self.depth * len(tensors):
            self._wait()

    def receive(self, like: Sequence[Tensor], step: int) -> list[Tensor]:
        """Wait for tensors from the rank of the segment before (step -1) or of the next one (1)."""
        chain, arrived = self.chain, []
        for x in like:
            if chain.size == 1:
                arrived.append(self._here.popleft())
                continue
            found = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            peer = (chain.rank + step) % chain.size
            dist.recv(plain(found), group=self._messages, group_src=peer)
            arrived.append(found.to(x.device, non_blocking=True))
        return arrived

    def finish(self) -> None:
        """Wait until all that was sent has been taken."""
        while self._under_way:
            self._wait()
        assert not self._here

    def _wait(self) -> None:
        work, _ = self._under_way.popleft()
        # None is what a process outside the group gets.
        assert work is not None
        work.wait()


def _on_host(x: Tensor) -> Tensor:
    """x where its host can send it, once it is there."""
    if not x.is_cuda:
        return x
    found = torch.empty_like(x, device="cpu", pin_memory=True)
    found.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return found


def _wanting(x: Tensor) -> Tensor:
    """x with a gradient: its neighbours send and expect one, also where all before it is frozen."""
    return x if x.requires_grad else x.detach().requires_grad_(differentiable(x))


class _Enter(torch.autograd.Function):
    """x and a state that arrived before; the backward sends the state's gradient back."""

    @staticmethod
    def forward(ctx: Any, wave: SegmentWave, x: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        ctx.wave = wave
        found = tuple(t.view_as(t) for t in kept)
        ctx.mark_non_differentiable(*(t for t in found if not differentiable(t)))
        return x.view_as(x), *found

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.wave.send([g for g in grads if g is not None and differentiable(g)], -1)
        return None, grad_x, *(None for _ in grads)


class _Leave(torch.autograd.Function):
    """y beside a state that was sent before; the backward takes the state's gradient in."""

    @staticmethod
    def forward(ctx: Any, wave: SegmentWave, y: Tensor, *state: Tensor) -> Tensor:
        ctx.wave = wave
        # Shapes alone: the memory of a view of nothing.
        ctx.like = [t.new_empty(()).expand(t.shape) if differentiable(t) else None for t in state]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        arrived = iter(ctx.wave.receive([t for t in ctx.like if t is not None], 1))
        return None, grad_y, *(None if t is None else next(arrived) for t in ctx.like)


class WaveBlock(Block):
    """A block that hands its state to the rank of the next segment."""

    wave: SegmentWave
    layer: int

    # Around the call and not within it: graphs of a compiled block hold no messages, and shared
    # parameters are gathered behind it.
    def __call__(self, x: Tensor, *, state: Any, **inputs: Any) -> tuple[Tensor, Any]:
        """As ``Block.forward``."""
        if self.wave.turn is None:
            return super().__call__(x, state=state, **inputs)
        x, entered = self.wave.enter(x, state, self.layer)
        y, state = super().__call__(x, state=entered, **inputs)
        return self.wave.leave(y, state, entered), state


class SegmentedDecoder(Decoder):
    """A decoder that can be trained in segments on the ranks of a group (``apply_segments``)."""

    wave: SegmentWave

    # FSDP's hooks on a GPU want an argument to move there, so both methods have one.

    def gather_parameters(self, like: Tensor) -> None:
        """Hold all parameters whole from now on, see ``fsdp.hold_whole``; like: any of the inputs."""
        hold_whole(self)

    def share_gradients(self, like: Tensor) -> Tensor:
        """0, whose backward pass sums the gradients of all segments over the ranks that share them.

        It lies where ``like`` does.

        A pass of its own: the sum is one of all ranks at a time, and each is at another layer while
        the wave runs.
        """
        share_out(self)
        return torch.zeros((), device=like.device, requires_grad=True).clone()

    def read_turn(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        segment: Segment,
        carried: DecoderState | None,
    ) -> Tensor | None:
        """Read one segment; its summed loss where there are labels."""
        x, _ = read_segment(self, input_ids, segment, carried)
        if labels is None:
            return None
        part = labels[:, segment.start : segment.end]
        return self.summed_loss(x.flatten(0, 1), part.flatten())

    def backward_in_segments(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        segment_tokens: int,
        cu_seqlens: Tensor | None = None,
        divisor: float = 1.0,
        context: Context = nullcontext,
    ) -> Tensor:
        """As ``models.segments.backward_in_segments``, of the whole batch on all ranks of the group.

        Every rank is given the same batch and gets the same loss; the gradients of a rank are those
        of its segments, to be summed over the group; those of shared parameters (FSDP) are, behind
        the last segment. Until then parameters are held whole, gathered once, and gradients are
        added up in whole tensors. Segments have at most a rank's share of the tokens.

        Raises:
            ValueError: fewer tokens in a row than ranks; as there.
            NotImplementedError: as there.
        """
        wave, seq = self.wave, input_ids.shape[-1]
        if seq < wave.chain.size:
            raise ValueError(
                f"seq is {seq}; expected at least one token for each of {wave.chain.size} ranks"
            )
        tokens = min(segment_tokens, seq // wave.chain.size)
        segments = plan_segments(self, input_ids, labels, tokens, cu_seqlens)
        self.gather_parameters(input_ids)
        total = torch.zeros((), dtype=torch.float64, device=input_ids.device)
        try:
            starts, after = self._first_pass(input_ids, segments, context)
            while starts:
                start = starts.pop()
                if start.random is not None:
                    set_random_state(start.random)
                wave.turn = start.turn._replace(again=True)
                with context():
                    loss = self.read_turn(input_ids, labels, start.segment, self._carried(start))
                if after is None and start.random is not None:
                    after = random_state()
                assert loss is not None
                (loss / divisor).backward()
                total += loss.detach()
            wave.finish()
            self.share_gradients(input_ids).backward()
        finally:
            wave.turn = None
        if after is not None:
            set_random_state(after)
        if wave.chain.size > 1:
            dist.all_reduce(total, group=wave.chain.group)
        return total

    @torch.no_grad()
    def _first_pass(
        self, input_ids: Tensor, segments: list[Segment], context: Context
    ) -> tuple[list["_Start"], dict[str, Tensor] | None]:
        """What each segment of this rank starts from, and the random state behind the last one.

        The very last segment is not computed, only what enters it is received; None then.
        """
        draws = self.training and drops_in_training(self)
        wave, starts, after = self.wave, [], None
        for index in range(wave.chain.rank, len(segments), wave.chain.size):
            segment = segments[index]
            behind = segments[index + 1] if index + 1 < len(segments) else None
            leaves = behind is not None and behind.history > 0
            turn = _Turn(segment.history > 0, leaves, segment.bounds is not None, False, [])
            rows = 1 if turn.packed else input_ids.shape[0]
            start = _Start(segment, turn, rows, random_state() if draws else None)
            starts.append(start)
            wave.turn, carried = turn, self._carried(start)
            if leaves or (draws and behind is not None):
                with context():
                    self.read_turn(input_ids, None, segment, carried)
                after = random_state() if draws else None
                continue
            after = None
            if carried is not None:
                turn.kept.extend(wave.receive_state(layer) for layer in carried.layers)
        return starts, after

    def _carried(self, start: "_Start") -> DecoderState | None:
        """Room for the rows that go on, which each layer's messages fill."""
        if not start.turn.enters:
            return None
        state = self.empty_state(start.rows)
        return state._replace(positions=state.positions + start.segment.history)


class _Start(NamedTuple):
    """A segment of this rank, what it starts from, and the random state before it."""

    segment: Segment
    turn: _Turn
    rows: int
    random: dict[str, Tensor] | None


def apply_segments(
    model: Decoder, chain: Chain, messages: dist.ProcessGroup | None = None
) -> SegmentedDecoder:
    """Let a model be trained in segments by the ranks of a chain; changes the model.

    Args:
        model: the same on every rank; parameters are not shared yet (``apply_fsdp`` comes behind).
        chain: the ranks, in the order of the segments; one rank alone is a chain too.
        messages: a group of the same ranks between their hosts (gloo), which GPUs need; None is the
            chain's own.
    """
    # Blocks give their states, and some ops give those as views. Nothing changes a state in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    wave = SegmentWave(chain, chain.group if messages is None else messages)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    wave.depth = len(blocks)
    for layer, block in enumerate(blocks):
        # Classes, not wrappers: names, copies and compiled calls stay as they are.
        mix_in(block, WaveBlock)
        assert isinstance(block, WaveBlock)
        block.wave, block.layer = wave, layer
    mix_in(model, SegmentedDecoder)
    assert isinstance(model, SegmentedDecoder)
    model.wave = wave
    return model
