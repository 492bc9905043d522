"""Attention within blocks: of every block_size tokens of a sequence, or of neighbours in a grid."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transnormer.nn.grid import from_blocks, to_blocks
from transnormer.nn.state import KVState

# (q, k, v, distance, visible) -> o: q [blocks, heads, queries, key_dim], k [blocks, heads, keys,
# key_dim], v [blocks, heads, keys, value_dim], o [blocks, heads, queries, value_dim]. distance is
# int64, query slot minus key slot, and visible bool: both broadcast to [blocks, 1, queries, keys].
# A query sees at least one key.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend: Attend,
    *,
    block_size: int,
    causal: bool,
    state: KVState | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, KVState | None]:
    """Attention of each token to the tokens of its own block (causal: to those up to itself).

    Token i of a sequence, counted over its real tokens, lies in block i // block_size at slot
    i % block_size. Counting is by tokens and not by ``positions``, which a caller may choose
    freely: the state says how far the last block is filled. So any split of a sequence, steps
    included, pads anywhere and packed sequences have the blocks of the whole.

    Args:
        q: [batch, seq, heads, key_dim].
        k: [batch, seq, heads, key_dim].
        v: [batch, seq, heads, value_dim].
        attend: the attention of one block, see ``Attend``.
        block_size: tokens of a block.
        causal: False lets a token see its whole block; there is then no state.
        state: the block that is not full yet, [batch or num_sequences, block_size, heads, dim];
            the valid slots come first.
        cu_seqlens: bounds of packed sequences; batch is then 1.
        mask: bool [batch, seq]; False tokens are in no block, and their o is 0.

    Returns:
        o, [batch, seq, heads, value_dim], and the new state (None where not causal).
    """
    if state is None and cu_seqlens is None and mask is None:
        return _whole_sequences(q, k, v, attend, block_size, causal)
    if state is not None:
        state = KVState(state.keys.to(k.dtype), state.values.to(v.dtype), state.valid)
        if q.shape[1] == 1 and cu_seqlens is None:
            return _one_token(q, k, v, attend, state, mask)
    return _scattered(q, k, v, attend, block_size, causal, state, cu_seqlens, mask)


def grid_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend: Attend,
    *,
    shape: tuple[int, ...],
    block_shape: tuple[int, ...],
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of each token of a grid to the tokens of its own block, both ways.

    The token at coordinates s lies in block s_j // block_shape_j along each axis j. The places that
    fill up the last block of an axis are seen by nobody. A masked token keeps its place: in a grid
    the others do not close up.

    Args:
        q: [batch, seq, heads, key_dim], seq row-major over ``shape``.
        k: [batch, seq, heads, key_dim].
        v: [batch, seq, heads, value_dim].
        attend: the attention of one block, see ``Attend``; slots are row-major in the block.
        shape: extents of the grid; their product is seq.
        block_shape: extents of a block, one an axis.
        mask: bool [batch, seq]; nobody sees False tokens, and their o is 0.

    Returns:
        o, [batch, seq, heads, value_dim].
    """
    batch, seq = q.shape[:2]
    real = torch.ones(1, seq, dtype=torch.bool, device=q.device) if mask is None else mask
    taken = to_blocks(real, shape, block_shape)
    first = torch.arange(taken.shape[2], device=q.device) == 0
    # One slot is visible where all are masked: softmax over nothing is not a number.
    visible = taken | (first & ~taken.any(-1, keepdim=True))
    visible = visible.expand(batch, -1, -1).flatten(0, 1)[:, None, None]
    q, k, v = (to_blocks(x, shape, block_shape).flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    o = attend(q, k, v, _distances(first.shape[0], q.device), visible).transpose(1, 2)
    o = from_blocks(o.unflatten(0, (batch, -1)), shape, block_shape)
    return o if mask is None else o.masked_fill(~mask[..., None, None], 0.0)


def empty_block(
    rows: int,
    block_size: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> KVState:
    """The state of ``rows`` sequences before their first token."""
    shape = (rows, block_size, heads)
    return KVState(
        torch.zeros(*shape, key_dim, dtype=dtype, device=device),
        torch.zeros(*shape, value_dim, dtype=dtype, device=device),
        torch.zeros(rows, block_size, dtype=torch.bool, device=device),
    )


def _distances(block_size: int, device: torch.device) -> Tensor:
    """Query slot minus key slot, [1, 1, block_size, block_size]."""
    slots = torch.arange(block_size, device=device)
    return (slots[:, None] - slots)[None, None]


def _whole_sequences(
    q: Tensor, k: Tensor, v: Tensor, attend: Attend, block_size: int, causal: bool
) -> tuple[Tensor, KVState | None]:
    """Every row begins here and has no pads: blocks are a view."""
    batch, seq = q.shape[:2]
    count = (seq + block_size - 1) // block_size
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, count * block_size - seq)) for x in (q, k, v))
    q_blocks, k_blocks, v_blocks = (
        x.unflatten(1, (count, block_size)).flatten(0, 1).transpose(1, 2) for x in (q, k, v)
    )
    distance = _distances(block_size, q.device)
    if causal:
        visible = distance >= 0
    else:
        token = torch.arange(count * block_size, device=q.device).view(count, 1, 1, block_size)
        visible = (token < seq).repeat(batch, 1, 1, 1)
    o = attend(q_blocks, k_blocks, v_blocks, distance, visible).transpose(1, 2)
    o = o.unflatten(0, (batch, count)).flatten(1, 2)[:, :seq]
    if not causal:
        return o, None
    valid = (torch.arange(block_size, device=q.device) < seq % block_size).repeat(batch, 1)
    # No view, which would keep the keys and values of the whole sequence in memory.
    hidden = ~valid[..., None, None]
    keys, values = (x[:, -block_size:].masked_fill(hidden, 0.0) for x in (k, v))
    return o, KVState(keys, values, valid)


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, attend: Attend, state: KVState, mask: Tensor | None
) -> tuple[Tensor, KVState]:
    """A decoding step: one query a row, against the row's unfinished block."""
    slots = torch.arange(state.valid.shape[1], device=q.device)
    slot = state.valid.sum(1, keepdim=True)
    here = slots == slot
    if mask is not None:
        here = here & mask
    at = here[..., None, None]
    keys, values = torch.where(at, k, state.keys), torch.where(at, v, state.values)
    distance = (slot - slots)[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, keys, values))
    o = attend(q, k, v, distance, distance >= 0).transpose(1, 2)
    valid = state.valid | here
    full = valid.all(1, keepdim=True)
    end = full[..., None, None]
    return o, KVState(keys.masked_fill(end, 0.0), values.masked_fill(end, 0.0), valid & ~full)


class _Places(NamedTuple):
    """Where tokens go in a row of blocks; sequence after sequence, all shapes are static.

    Attributes:
        blocks: number of blocks of the row.
        tokens: slot of each token in the row, [batch * seq]; pads have the one after the last.
        held: slot of each of the state's tokens, [rows * block_size], likewise.
        last: slots of each sequence's unfinished block, [rows, block_size].
        filled: how many tokens are in that block, [rows].
    """

    blocks: int
    tokens: Tensor
    held: Tensor
    last: Tensor
    filled: Tensor


def _places(
    batch: int,
    seq: int,
    block_size: int,
    device: torch.device,
    state: KVState | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> _Places:
    if mask is None:
        mask = torch.ones(batch, seq, dtype=torch.bool, device=device)
    counted = mask.to(torch.int64).cumsum(1)
    if cu_seqlens is None:
        rows = batch
        row = torch.arange(rows, device=device)[:, None].expand(batch, seq)
        before, after = counted.new_zeros(rows), counted[:, -1]
    else:
        rows = cu_seqlens.shape[0] - 1
        bounds = cu_seqlens.to(torch.int64)
        row = torch.searchsorted(bounds[1:], torch.arange(seq, device=device), right=True)[None]
        counted_to = F.pad(counted[0], (1, 0))[bounds]
        before, after = counted_to[:-1], counted_to[1:]
    held = counted.new_zeros(rows) if state is None else state.valid.sum(1)
    total = held + after - before
    # The unfinished block always exists, be it empty: the new state is read from it.
    if cu_seqlens is None:
        each = (seq + (block_size - 1) * (state is not None)) // block_size + 1
        blocks = rows * each
        first = torch.arange(rows, device=device) * each
    else:
        # A state's tokens and the remainder of its sequence may each open one block more.
        blocks = seq // block_size + rows * (1 if state is None else 2)
        each = total // block_size + 1
        first = each.cumsum(0) - each
    none = blocks * block_size
    tokens = first[row] * block_size + held[row] + counted - 1 - before[row]
    slots = torch.arange(block_size, device=device)
    start = first[:, None] * block_size + slots
    return _Places(
        blocks,
        torch.where(mask, tokens, none).flatten(),
        torch.where(slots < held[:, None], start, none).flatten(),
        (first + total // block_size)[:, None] * block_size + slots,
        total % block_size,
    )


def _scattered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend: Attend,
    block_size: int,
    causal: bool,
    state: KVState | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, KVState | None]:
    """Any rows: tokens are copied to their slots, and outputs fetched from there."""
    batch, seq = q.shape[:2]
    places = _places(batch, seq, block_size, q.device, state, cu_seqlens, mask)
    length = places.blocks * block_size

    def spread(x: Tensor, held: Tensor | None) -> Tensor:
        index, x = places.tokens, x.flatten(0, 1)
        if held is not None:
            index, x = torch.cat([places.held, index]), torch.cat([held.flatten(0, 1), x])
        # The entry after the last slot takes the pads; nobody looks at it.
        return x.new_zeros(length + 1, *x.shape[1:]).index_copy(0, index, x)[:length]

    queries = spread(q, None)
    keys = spread(k, None if state is None else state.keys)
    values = spread(v, None if state is None else state.values)
    q, k, v = (x.unflatten(0, (-1, block_size)).transpose(1, 2) for x in (queries, keys, values))
    distance = _distances(block_size, q.device)
    visible = distance >= 0
    if not causal:
        taken = torch.zeros(length + 1, dtype=torch.bool, device=q.device)
        taken = taken.index_fill(0, places.tokens, True)[:length].view(-1, 1, 1, block_size)
        # The first slot is visible in empty blocks too: softmax over nothing is not a number.
        visible = taken | (distance[:, :, :1] == 0)
    o = attend(q, k, v, distance, visible).transpose(1, 2).flatten(0, 1)
    o = F.pad(o, (0, 0, 0, 0, 0, 1))[places.tokens].unflatten(0, (batch, seq))
    if not causal:
        return o, None
    valid = torch.arange(block_size, device=q.device) < places.filled[:, None]
    return o, KVState(keys[places.last], values[places.last], valid)
