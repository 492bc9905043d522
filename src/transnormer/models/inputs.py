"""What a decoder's forward pass may be given: checks, positions, and which logits to keep."""

import math

import torch
from torch import Tensor

from transnormer.models.state import DecoderState
from transnormer.nn.state import SlotState
from transnormer.ops import checks


def check(
    input_ids: Tensor,
    vocab_size: int,
    state: DecoderState | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> None:
    """Check ids, packing and mask; values only where looking costs no synchronisation."""
    checks.check_tensor("input_ids", input_ids)
    for name, x in (("cu_seqlens", cu_seqlens), ("mask", mask)):
        checks.check_tensor(name, x, optional=True)
    if state is not None and not isinstance(state, DecoderState):
        raise TypeError(f"state is {type(state).__name__}; expected a DecoderState or None")
    checks.check_rank("input_ids", input_ids, "batch seq")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids is {input_ids.dtype}; expected int64 or int32")
    batch, seq = input_ids.shape
    if batch == 0 or seq == 0:
        raise ValueError(f"input_ids has shape {[batch, seq]}; expected at least one token")
    if checks.values_are_visible(input_ids):
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"input_ids holds {wrong}; expected 0 to {vocab_size - 1}, the vocabulary of the "
                "model; check that the tokenizer belongs to it"
            )
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, batch, seq, input_ids.device)
    if mask is not None:
        checks.check_shape("mask", mask, (batch, seq), "batch seq")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask is {mask.dtype}; expected torch.bool, True at real tokens")
    if state is not None and not causal:
        raise NotImplementedError("a bidirectional model (causal=False) has no state; pass None")


def check_shape(
    shape: tuple[int, ...], seq: int, condition_tokens: int, causal: bool, packed: bool
) -> None:
    """Raise unless the extents of a grid fit a bidirectional model's seq tokens."""
    if causal:
        raise NotImplementedError(
            f"shape is {shape}; expected None for a causal model: a grid has no one order, and a "
            "state holds none; use causal=False"
        )
    if packed:
        raise NotImplementedError(
            f"shape is {shape}; expected None with cu_seqlens: grids are not packed; give them as "
            "the rows of a batch"
        )
    if not isinstance(shape, tuple) or not all(isinstance(extent, int) for extent in shape):
        raise TypeError(f"shape is {shape!r}; expected a tuple of integers or None")
    if not shape or min(shape) < 1:
        raise ValueError(f"shape is {shape}; expected one or more extents of at least 1")
    if math.prod(shape) + condition_tokens != seq:
        lead = f" after {condition_tokens} condition tokens" if condition_tokens else ""
        raise ValueError(
            f"shape is {shape}, {math.prod(shape)} tokens; expected the {seq - condition_tokens} of "
            f"each row of input_ids{lead}"
        )


def check_state(
    state: DecoderState,
    layer_types: tuple[type, ...],
    input_ids: Tensor,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError unless the state has layers of these types and one row a sequence."""
    num_layers = len(layer_types)
    rows = input_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if len(state.layers) != num_layers:
        raise ValueError(
            f"state has {len(state.layers)} layers; expected {num_layers}, those of this model"
        )
    for i, (layer, expected) in enumerate(zip(state.layers, layer_types, strict=True)):
        if not isinstance(layer, (expected, SlotState)):
            raise ValueError(
                f"state.layers[{i}] is a {type(layer).__name__}; expected a {expected.__name__}, "
                "that of this model's layer; use a state of this model"
            )
    if state.positions.dtype != torch.int64:
        raise TypeError(f"state.positions is {state.positions.dtype}; expected torch.int64")
    if state.positions.shape[0] != rows:
        raise ValueError(
            f"state has {state.positions.shape[0]} rows; expected {rows}, one a sequence of "
            "input_ids; use state.select(rows)"
        )


def needed_mask(mask: Tensor | None) -> Tensor | None:
    """None for a mask that is seen to hide nothing: constant decay stays constant without one."""
    if mask is not None and checks.values_are_visible(mask) and bool(mask.all()):
        return None
    return mask


def finite_pads(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, [batch, seq, model_dim], without the NaN and infinities of masked tokens.

    Layers give a masked token the weight 0, and 0 times NaN is NaN.
    """
    return x if mask is None else torch.where(mask[..., None], x, x.nan_to_num(0.0, 0.0, 0.0))


def check_positions(positions: Tensor, max_positions: int) -> None:
    """Raise ValueError where learned positions end before the sequence does."""
    if checks.values_are_visible(positions) and int(positions.max()) >= max_positions:
        raise ValueError(
            f"positions reach {int(positions.max())}; expected less than max_positions, which is "
            f"{max_positions}; a model with learned positions cannot go further"
        )


def _sequence_of(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Index of the packed sequence that each token of x, [1, seq, ...], lies in, [seq]."""
    token = torch.arange(x.shape[1], device=x.device)
    return torch.searchsorted(cu_seqlens[1:].to(torch.int64), token, right=True)


def positions_of(
    input_ids: Tensor,
    state: DecoderState | None,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Positions of the tokens, int64 [batch, seq]; given ones win."""
    batch, seq = input_ids.shape
    if positions is not None:
        checks.check_tensor("positions", positions)
        if positions.dtype != torch.int64:
            raise TypeError(f"positions is {positions.dtype}; expected torch.int64")
        if positions.dim() == 1:
            positions = positions.expand(batch, -1)
        checks.check_shape("positions", positions, (batch, seq), "batch seq")
        return positions
    if mask is None:
        token = torch.arange(seq, device=input_ids.device).expand(batch, -1)
    else:
        # A pad has the position of the token before it, so that real tokens count on.
        token = mask.to(torch.int64).cumsum(1) - 1
    if cu_seqlens is None:
        token = token.clamp(min=0)
        return token if state is None else token + state.positions[:, None]
    index = _sequence_of(input_ids, cu_seqlens)
    # What was counted before each sequence began.
    before = torch.cat([token.new_full((1, 1), -1), token], 1)[:, cu_seqlens.to(torch.int64)]
    token = (token - before[:, index] - 1).clamp(min=0)
    return token if state is None else token + state.positions[index]


def positions_after(
    positions: Tensor,
    state: DecoderState | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """The position of the next token of each row (or packed sequence), int64 [rows]."""
    batch, seq = positions.shape
    if cu_seqlens is None and mask is None:
        return positions[:, -1] + 1
    token = torch.arange(seq, device=positions.device).expand(batch, -1)
    if mask is not None:
        # The last real token up to each place; -1 before the first.
        token = torch.where(mask, token, -1).cummax(1).values
    if cu_seqlens is None:
        starts = token.new_zeros(batch)
        last = token[:, -1]
        after = positions.gather(1, last.clamp(min=0)[:, None])[:, 0] + 1
    else:
        starts, ends = cu_seqlens.to(torch.int64)[:-1], cu_seqlens.to(torch.int64)[1:]
        last = torch.where(ends > starts, token[0, (ends - 1).clamp(min=0)], -1)
        after = positions[0, last.clamp(min=0)] + 1
    before = torch.zeros_like(starts) if state is None else state.positions
    return torch.where(last >= starts, after, before)


def keep_last(x: Tensor, count: int, cu_seqlens: Tensor | None) -> Tensor:
    """The last ``count`` of each row, [batch, seq, dim]; of each packed sequence, concatenated."""
    if count < 1:
        raise ValueError(f"logits_to_keep is {count}; expected at least 1, or None for all")
    if cu_seqlens is None:
        return x[:, -count:]
    ends = cu_seqlens.to(torch.int64)[1:]
    token = torch.arange(x.shape[1], device=x.device)
    return x[:, token >= ends[_sequence_of(x, cu_seqlens)] - count]
