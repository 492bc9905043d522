"""Exact gradients of sequences of any length with the activations of one segment.

A layer whose state has a constant size sees the past through that state alone. So a forward pass
keeps the state at the start of every segment and nothing else; the backward pass takes the segments
from the last to the first, computes each again with its graph, and hands the gradient of the state
at its start to the segment before it. This is backpropagation through the whole sequence, not a
truncated one, with the memory of one segment and one state a segment.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transnormer.models import inputs
from transnormer.models.cost import bytes_per_token
from transnormer.models.decoder import Decoder
from transnormer.models.random_state import (
    drops_in_training,
    random_state,
    set_random_state,
)
from transnormer.models.state import DecoderState
from transnormer.nn.state import LayerState, map_tensors, tensors_of
from transnormer.ops.checks import check_cu_seqlens, check_tensor

Context = Callable[[], AbstractContextManager[object]]


class Segment(NamedTuple):
    """Tokens start to end of every row.

    Attributes:
        bounds: of the packed sequences inside, from 0 to end - start; None where rows are sequences.
        history: tokens before it of its rows (packed: of its first one); 0 where they begin here.
    """

    start: int
    end: int
    bounds: tuple[int, ...] | None
    history: int


class _Start(NamedTuple):
    """What a segment starts from: the rows that continue, None for none, and the random state."""

    state: DecoderState | None
    random: dict[str, Tensor] | None


def check_segments(model: Decoder) -> None:
    """Raise NotImplementedError unless every layer of the model has a state of constant size."""
    for index, layer in enumerate(model.empty_state(1, device="meta").layers):
        if bytes_per_token(layer):
            kind = model.config.blocks[index].token_mixer.kind
            raise NotImplementedError(
                f"blocks[{index}].token_mixer.kind is {kind!r}, whose state holds every token read "
                "so far; expected states of constant size for training in segments, whose memory "
                "would otherwise grow with the sequence; train whole sequences, or take another "
                "mixer"
            )


def backward_in_segments(
    model: Decoder,
    input_ids: Tensor,
    labels: Tensor,
    *,
    segment_tokens: int,
    cu_seqlens: Tensor | None = None,
    divisor: float = 1.0,
    context: Context = nullcontext,
) -> Tensor:
    """Add the gradient of the summed loss / divisor to the parameters; return the summed loss.

    Equal to ``(model.loss(input_ids, labels, reduction="sum", ...) / divisor).backward()`` up to
    rounding, for any length of the segments; packed sequences may cross their borders. It costs one
    forward pass more than that, without the head and the last segment. States and their gradients
    are float32 (float64 for a float64 model), so gradients do not degrade with the number of
    segments. Dropout draws its masks segment by segment, other ones than for whole sequences;
    the second computation of a segment repeats the masks of the first, so that the gradient is that
    of the loss returned.

    Args:
        model: causal, with states of constant size.
        input_ids: [batch, seq].
        labels: int64 [batch, seq]; position t predicts labels[t]; -100 is ignored.
        segment_tokens: tokens of each row in one segment; the last may be shorter.
        cu_seqlens: bounds of packed sequences, as ``Decoder.loss``'s. The segments are planned from
            its values: on a GPU reading them waits for the device, so give it on the CPU.
        divisor: of the loss, for the gradient alone.
        context: entered around every forward pass, such as autocast.

    Returns:
        the summed loss in nats, float64, without a graph.

    Raises:
        NotImplementedError: a bidirectional model, or one with states that grow (softmax layers).
        ValueError: segment_tokens below 1; as ``Decoder.loss``.
    """
    segments = plan_segments(model, input_ids, labels, segment_tokens, cu_seqlens)
    starts = _forward(model, input_ids, segments, context)
    after = None
    total = torch.zeros((), dtype=torch.float64, device=input_ids.device)
    grads: tuple[Any, ...] | None = None
    for segment, start in reversed(list(zip(segments, starts, strict=True))):
        if start.random is not None and segment.end < input_ids.shape[1]:
            set_random_state(start.random)
        carried = None if start.state is None else _leaves(start.state)
        with context():
            x, state = read_segment(model, input_ids, segment, carried)
            part = labels[:, segment.start : segment.end]
            loss = model.summed_loss(x.flatten(0, 1), part.flatten())
        if after is None and start.random is not None:
            after = random_state()
        outputs: list[Tensor] = [loss / divisor]
        given: list[Tensor | None] = [None]
        for tensor, grad in zip(_differentiable(_carried(state, segment)), grads or ()):
            if grad is not None and tensor.requires_grad:
                outputs.append(tensor)
                given.append(grad)
        torch.autograd.backward(outputs, given)
        total += loss.detach()
        grads = None if carried is None else tuple(x.grad for x in _differentiable(carried))
    if after is not None:
        set_random_state(after)
    return total


def plan_segments(
    model: Decoder,
    input_ids: Tensor,
    labels: Tensor,
    segment_tokens: int,
    cu_seqlens: Tensor | None,
) -> list[Segment]:
    """The segments of the rows of a batch; arguments and errors as ``backward_in_segments``'s."""
    if segment_tokens < 1:
        raise ValueError(f"segment_tokens is {segment_tokens}; expected at least 1")
    config = model.config
    inputs.check(input_ids, config.vocab_size, None, None, None, config.causal)
    check_tensor("labels", labels)
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels has shape {list(labels.shape)}; expected input_ids' {list(input_ids.shape)}"
        )
    batch, seq = input_ids.shape
    bounds = None
    if cu_seqlens is not None:
        # Planning cuts the bounds to segments, which would hide that they do not fit.
        cu_seqlens = cu_seqlens.cpu()
        check_cu_seqlens(cu_seqlens, batch, seq, cu_seqlens.device)
        bounds = cu_seqlens.tolist()
    check_segments(model)
    segments = []
    for start in range(0, seq, segment_tokens):
        end = min(start + segment_tokens, seq)
        if bounds is None:
            segments.append(Segment(start, end, None, start))
            continue
        inside = tuple(sorted({min(max(x, start), end) - start for x in (*bounds, start, end)}))
        began = max(x for x in bounds if x <= start)
        segments.append(Segment(start, end, inside, start - began))
    return segments


@torch.no_grad()
def _forward(
    model: Decoder, input_ids: Tensor, segments: list[Segment], context: Context
) -> list[_Start]:
    """What every segment starts from; the last segment is not computed."""
    draws = model.training and drops_in_training(model)
    starts, carried = [], None
    for segment, following in zip(segments, [*segments[1:], None], strict=True):
        starts.append(_Start(carried, random_state() if draws else None))
        if following is None:
            break
        with context():
            _, state = read_segment(model, input_ids, segment, carried)
        carried = _carried(state, segment) if following.history else None
    return starts


def read_segment(
    model: Decoder, input_ids: Tensor, segment: Segment, carried: DecoderState | None
) -> tuple[Tensor, DecoderState]:
    """Hidden states of a segment, and the state of all its rows after it.

    Args:
        model: as ``backward_in_segments``'s.
        input_ids: whole rows.
        segment: which of their tokens.
        carried: what the rows that continue start from; None where none does.
    """
    ids = input_ids[:, segment.start : segment.end]
    bounds, rows = None, input_ids.shape[0]
    if segment.bounds is not None:
        bounds = torch.tensor(segment.bounds, dtype=torch.int32).to(ids.device, non_blocking=True)
        rows = len(segment.bounds) - 1
    old = 0 if carried is None else carried.positions.shape[0]
    # Never None: one kind of call, so that a compiled block is compiled once.
    state = model.empty_state(rows - old)
    if carried is not None:
        state = carried if old == rows else _joined(carried, state)
    x, after = model.hidden(ids, state, cu_seqlens=bounds)
    assert after is not None
    return x, after


def _joined(first: DecoderState, second: DecoderState) -> DecoderState:
    """The rows of two states, one after the other."""
    layers = []
    for a, b in zip(first.layers, second.layers, strict=True):
        parts = [torch.cat(pair) for pair in zip(tensors_of(a), tensors_of(b), strict=True)]
        layers.append(parts[0] if isinstance(a, Tensor) else type(a)(*parts))
    return DecoderState(tuple(layers), torch.cat([first.positions, second.positions]))


def _carried(state: DecoderState, segment: Segment) -> DecoderState:
    """The rows that may go on behind a segment: all, or the last packed sequence."""
    if segment.bounds is None:
        return state
    # A slice, since an index would be copied to the device, and waited for.
    layers = tuple(map_tensors(lambda x: x[-1:], layer) for layer in state.layers)
    return DecoderState(layers, state.positions[-1:])


def _leaves(state: DecoderState) -> DecoderState:
    """The same values, from which gradients are wanted."""

    def leaf(x: Tensor) -> Tensor:
        x = x.detach()
        return x.requires_grad_() if x.is_floating_point() or x.is_complex() else x

    return state._replace(layers=tuple(map_tensors(leaf, layer) for layer in state.layers))


def _differentiable(state: DecoderState) -> list[Tensor]:
    """The tensors of a state that may have a gradient, in a fixed order."""
    layers: tuple[LayerState, ...] = state.layers
    return [
        x for layer in layers for x in tensors_of(layer) if x.is_floating_point() or x.is_complex()
    ]
