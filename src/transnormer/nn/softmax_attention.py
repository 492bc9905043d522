"""Softmax attention over rows, and over packed sequences, with a cache of past tokens.

A mask is a tensor of seq x length entries, so none is made where the tokens need none: a causal
batch without pads and without a past runs PyTorch's causal kernels (flash attention on a GPU).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transnormer.nn.state import KVState

# Entries of a mask that is alive at once; more queries than that are taken in parts.
_MASK_ENTRIES = 2**26


class SoftmaxAttentionCore(nn.Module):
    """Softmax attention as a module: the parameter-free seam between a mixer's projections and it.

    Args:
        causal: a token sees those up to itself; otherwise all.
    """

    def __init__(self, *, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        state: KVState | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        keep_state: bool,
    ) -> tuple[Tensor, KVState | None]:
        """Mix along seq; arguments and results as ``attention``'s and ``packed_attention``'s."""
        options = {"causal": self.causal, "keep_state": keep_state and self.causal}
        if cu_seqlens is None:
            return attention(q, k, v, mask=mask, past=state, **options)
        return packed_attention(q, k, v, cu_seqlens, mask=mask, past=state, **options)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    past: KVState | None = None,
    keep_state: bool = True,
) -> tuple[Tensor, KVState | None]:
    """softmax(q k^T / sqrt(key_dim)) v within each row, after the tokens of ``past``.

    Computed in the inputs' dtype with the softmax in float32 or better. A row of pads alone gives
    finite values.

    Args:
        q: [batch, seq, heads, key_dim].
        k: [batch, seq, kv_heads, key_dim]; kv_heads divides heads.
        v: [batch, seq, kv_heads, value_dim].
        causal: token t sees the past and the tokens up to itself; otherwise all.
        mask: bool [batch, seq]; a False token is seen by itself alone.
        past: what earlier tokens left, [batch, ...]; not modified.
        keep_state: False returns no state, and spends nothing on one.

    Returns:
        o, [batch, seq, heads, value_dim], and the state with the new tokens (None without
        ``keep_state``).
    """
    if mask is not None:
        # Not only hidden: nothing of a pad stays in the cache, and 0 x infinity cannot be.
        k, v = (x.masked_fill(~mask[..., None, None], 0.0) for x in (k, v))
    state = appended(past, k, v, mask)
    if past is None and mask is None:
        o = _attend(q, k, v, causal=causal)
    else:
        o = _attend_to_valid(q, state, causal=causal)
    return o, state if keep_state else None


def appended(past: KVState | None, k: Tensor, v: Tensor, mask: Tensor | None) -> KVState:
    """The state after more tokens; one that is valid where ``mask`` is True or None."""
    valid = k.new_ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
    if past is None:
        return KVState(k, v, valid)
    # Under autocast an empty state may have the weights' dtype.
    return KVState(
        torch.cat([past.keys.to(k.dtype), k], 1),
        torch.cat([past.values.to(v.dtype), v], 1),
        torch.cat([past.valid, valid], 1),
    )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, visible: Tensor | None = None
) -> Tensor:
    """Attention of [batch, seq, heads, dim]; ``visible`` is a bool [batch, seq, length] or None."""
    groups = q.shape[2] // k.shape[2]
    # Only flash attention, which takes half precision and no mask, reads grouped heads in place;
    # elsewhere asking for them would cost the whole matrix of scores.
    in_place = groups > 1 and visible is None and q.dtype in (torch.float16, torch.bfloat16)
    if groups > 1 and not in_place:
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if visible is None else visible[:, None],
        is_causal=causal,
        enable_gqa=in_place,
    )
    return o.transpose(1, 2)


def _attend_to_valid(q: Tensor, state: KVState, *, causal: bool) -> Tensor:
    """Attention of the last tokens of a state to its valid slots, and of each token to itself."""
    batch, seq = q.shape[:2]
    keys, values, valid = state
    length = keys.shape[1]
    slot = torch.arange(length, device=q.device)
    own = slot[length - seq :, None]
    if seq == 1:
        # All heads of a group see the same slots: as queries of one head they read it once.
        folded = q.unflatten(2, (keys.shape[2], -1)).squeeze(1).transpose(1, 2)
        visible = (valid | (slot == own))[:, None]
        return _attend(folded, keys, values, visible=visible).transpose(1, 2).flatten(1, 2)[:, None]
    rows = seq
    if not torch.compiler.is_compiling():
        rows = min(seq, max(1, _MASK_ENTRIES // (batch * length)))
    parts = []
    for start in range(0, seq, rows):
        at = own[start : start + rows]
        end = min(length - seq + start + rows, length) if causal else length
        visible = valid[:, None, :end] | (slot[:end] == at)
        if causal:
            visible = visible & (slot[:end] <= at)
        queries = q[:, start : start + rows]
        parts.append(_attend(queries, keys[:, :end], values[:, :end], visible=visible))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    past: KVState | None = None,
    keep_state: bool = True,
) -> tuple[Tensor, KVState | None]:
    """``attention`` within each packed sequence; rows of states are sequences.

    The bounds are read on the host, which waits for a GPU: sequences of like lengths become padded
    rows, at most twice as many tokens as there are, and causal ones need no mask. A graph of
    torch.compile cannot depend on the bounds' values: there a mask of seq x seq entries (beside the
    slots of all rows of ``past``) tells the sequences apart, and a returned state has seq slots a
    row.

    Args:
        q, k, v: as ``attention``'s, batch 1.
        cu_seqlens: bounds of the sequences, [num_sequences + 1].
        causal, mask, past, keep_state: as ``attention``'s.

    Returns:
        o, [1, seq, heads, value_dim], and the state, rows shorter than the longest padded with
        slots that are not valid.
    """
    bounds = cu_seqlens.to(torch.int64)
    starts, lengths = bounds[:-1], bounds.diff()
    if torch.compiler.is_compiling():
        longest = k.shape[1]
        o = _attend_by_mask(q, k, v, bounds, causal=causal, mask=mask, past=past)
    else:
        sizes = lengths.tolist()
        longest = max(sizes)
        o = _attend_by_rows(q, k, v, starts, sizes, causal=causal, mask=mask, past=past)
    if not keep_state:
        return o, None
    index, real = _slots(starts, lengths, longest)
    if mask is not None:
        real = real & mask[0][index]
    rows = [_gather(x, index).masked_fill(~real[..., None, None], 0.0) for x in (k, v)]
    return o, appended(past, rows[0], rows[1], real)


def _slots(starts: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Token of each slot of padded rows and whether it is one, [rows, longest]."""
    token = torch.arange(longest, device=starts.device)
    # A pad repeats its row's last token: nothing of another sequence comes into the row.
    last = (lengths - 1).clamp(min=0)[:, None]
    first = torch.where(lengths > 0, starts, 0)[:, None]
    return first + torch.minimum(token, last), token < lengths[:, None]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x, [1, seq, ...], by an index [rows, length]."""
    # index_select, since the backward of x[0][index] sorts.
    return x[0].index_select(0, index.flatten()).unflatten(0, index.shape)


def _attend_by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    sizes: list[int],
    *,
    causal: bool,
    mask: Tensor | None,
    past: KVState | None,
) -> Tensor:
    """Attention within packed sequences as padded rows; those within a factor of two together."""
    by_size: dict[int, list[int]] = {}
    for row, size in enumerate(sizes):
        if size:
            by_size.setdefault((size - 1).bit_length(), []).append(row)
    lengths = torch.tensor(sizes, device=q.device)
    # Where the first token of each sequence is among all padded outputs.
    outputs, places, count = [], [0] * len(sizes), 0
    for group in by_size.values():
        longest = max(sizes[row] for row in group)
        for row in group:
            places[row], count = count, count + longest
        rows = torch.tensor(group, device=q.device)
        index, real = _slots(starts.index_select(0, rows), lengths.index_select(0, rows), longest)
        row_mask = None
        if mask is not None:
            row_mask = mask[0][index] & real
        elif not causal and any(sizes[row] < longest for row in group):
            # Pads on the right are in nobody's past, but in everybody's view.
            row_mask = real
        o, _ = attention(
            *(_gather(x, index) for x in (q, k, v)),
            causal=causal,
            mask=row_mask,
            past=None if past is None else KVState(*(x.index_select(0, rows) for x in past)),
            keep_state=False,
        )
        outputs.append(o.flatten(0, 1))
    seq = q.shape[1]
    shift = torch.tensor(places, device=q.device) - starts
    place = torch.arange(seq, device=q.device) + shift.repeat_interleave(lengths, output_size=seq)
    return torch.cat(outputs).index_select(0, place)[None]


def _attend_by_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    past: KVState | None,
) -> Tensor:
    """Attention within packed sequences by one mask over all tokens and all past slots."""
    token = torch.arange(q.shape[1], device=q.device)
    sequence = torch.searchsorted(bounds[1:], token, right=True)
    visible = sequence[:, None] == sequence
    if causal:
        visible = visible & (token <= token[:, None])
    if mask is not None:
        visible = (visible & mask[0]) | (token == token[:, None])
        k, v = (x.masked_fill(~mask[..., None, None], 0.0) for x in (k, v))
    if past is not None:
        row = torch.arange(past.valid.shape[0], device=q.device)
        before = (sequence[:, None] == row)[..., None] & past.valid
        visible = torch.cat([before.flatten(1), visible], 1)
        k = torch.cat([past.keys.to(k.dtype).flatten(0, 1)[None], k], 1)
        v = torch.cat([past.values.to(v.dtype).flatten(0, 1)[None], v], 1)
    return _attend(q, k, v, visible=visible[None])
