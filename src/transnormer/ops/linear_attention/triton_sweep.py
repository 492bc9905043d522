"""Walks over the chunks of a unit: with constant decay, and with scalar gates.

``triton_constant`` has the recurrence, the layout and the uses of a sweep, ``triton_scalar`` what
gates change. Legend as in ``triton_constant``.
"""

import triton
import triton.language as tl

from transnormer.ops.linear_attention.triton_arithmetic import (
    add_to_state,
    as_operand,
    decay_state,
    load_tile,
    power,
    split_decay,
)
from transnormer.ops.linear_attention.triton_scalar import (
    LN_2,
    end_factors,
    key_shares,
    pair_factors,
    pair_shares,
    query_shares,
)

# Arguments stand in lines as they belong together.
# fmt: off


@triton.jit
def chunk(
    q, k, v, o, x, r, left, state, mask, scale, row_decay, weight, faint, kept, rest, rows, dims,
    values, D: tl.constexpr, E: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, MASK_D: tl.constexpr, MASK_E: tl.constexpr, TAIL: tl.constexpr,
    STEP: tl.constexpr, AGAINST: tl.constexpr, PARTS: tl.constexpr, SHARES: tl.constexpr,
):
    """One chunk; q, k [C, BD] and v, o [BE, C] are tiles of pointers. Returns the state after it.

    PARTS 0: mask is [C, C]. Above, with gates: mask points at the sums of the chunk's gates, see
    ``pair_factors``, and scale is that of the products within the chunk. SHARES: the second result
    is the gradient of the chunk's gates, [C], see ``query_shares``, with tiles of pointers x [BE, C]
    to the queries and r [BE, BD] to the gradient of the state that leaves; 0 otherwise.
    """
    inside, here = rows[:, None] < left, rows[None, :] < left
    q_ = load_tile(q, inside, dims[None, :] < D, TAIL, MASK_D, DTYPE)
    k_ = load_tile(k, inside, dims[None, :] < D, TAIL, MASK_D, DTYPE)
    v_ = load_tile(v, here, values[:, None] < E, TAIL, MASK_E, DTYPE)
    x_, sums, shares = 0.0, 0.0, 0.0
    if SHARES:
        x_ = load_tile(x, here, values[:, None] < E, TAIL, MASK_E, DTYPE)
        wide: tl.constexpr = r.dtype.element_ty
        r_ = load_tile(r, values[:, None] < E, dims[None, :] < D, MASK_E, MASK_D, wide)
        # First, while registers hold little but the state.
        sums = key_shares(k_, v_, r_, state, weight, kept + rest, left, rows, DTYPE, PRECISION)
    state_, factor = as_operand(state, DTYPE)
    out = tl.dot(state_, tl.trans(q_), input_precision=PRECISION)
    out = out * (row_decay * factor)[None, :]
    if SHARES:
        sums += query_shares(out, x_, rows, DTYPE, PRECISION)
    p = tl.dot(k_, tl.trans(q_), input_precision=PRECISION)
    if PARTS == 0:
        p *= mask
    else:
        p *= pair_factors(mask, rows, left, STEP, AGAINST, PARTS, TAIL) * scale
    if SHARES:
        pairs = pair_shares(p, x_, v_, rows, DTYPE, PRECISION)
        if values.shape[0] == rows.shape[0]:
            shares = tl.sum(sums + pairs, 0)
        else:
            shares = tl.sum(sums, 0) + tl.sum(pairs, 0)
    p_, factor = as_operand(p, DTYPE)
    if DTYPE == tl.float16:
        out += tl.dot(v_, p_, input_precision=PRECISION) * factor
    else:
        out = tl.dot(v_, p_, acc=out, input_precision=PRECISION)
    state = decay_state(state, kept, rest, EXACT)
    state = add_to_state(state, k_, v_, weight, faint, DTYPE, PRECISION)
    out = out.to(o.dtype.element_ty)
    if TAIL:
        tl.store(o, out, mask=here & (values[:, None] < E))
    elif MASK_E:
        tl.store(o, out, mask=values[:, None] < E)
    else:
        tl.store(o, out)
    return state, shares


@triton.jit
def sweep(
    q, k, v, o, q_step, k_step, v_step, o_step, length, state, g, shift, scale, row_scale,
    key_scale, first_value, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Run a unit from its first token (in scan order) to its last; return the state after it.

    q, k, v, o point at the head's first token; the steps to the next one are negative where the
    order is opposite to the tensor's. ``scale`` is that of the products within a chunk, row_scale
    of the products with the state, key_scale of what enters the state.
    """
    rows, dims = tl.arange(0, C), tl.arange(0, BD)
    values = first_value + tl.arange(0, BE)
    q += rows[:, None] * q_step + dims[None, :]
    k += rows[:, None] * k_step + dims[None, :]
    v += values[:, None] + rows[None, :] * v_step
    o += values[:, None] + rows[None, :] * o_step
    # Transposed, as the products are: [key position, query position].
    mask = power(g, rows[None, :] - rows[:, None]) * scale
    row_decay = power(g, rows + 1 - shift) * row_scale
    weight = power(g, C - 1 - rows)
    faint = power(g, shift) * key_scale
    kept, rest = split_decay(g * C)
    MASK_D: tl.constexpr = D != BD
    MASK_E: tl.constexpr = E % BE != 0
    full = length // C
    for c in tl.range(0, full, num_stages=STAGES):
        at = c * C
        state, _ = chunk(
            q + at * q_step, k + at * k_step, v + at * v_step, o + at * o_step, None, None, C, state,
            mask, 1.0, row_decay, weight, faint, kept, rest, rows, dims, values, D, E, DTYPE,
            PRECISION, EXACT, MASK_D, MASK_E, False, 1, False, 0, False,
        )
    left = (length - full * C).to(tl.int32)
    if left > 0:
        at = full * C
        weight = tl.where(rows < left, power(g, left - 1 - rows), 0.0)
        kept, rest = split_decay(g * left)
        state, _ = chunk(
            q + at * q_step, k + at * k_step, v + at * v_step, o + at * o_step, None, None, left,
            state, mask, 1.0, row_decay, weight, faint, kept, rest, rows, dims, values, D, E, DTYPE,
            PRECISION, EXACT, MASK_D, MASK_E, True, 1, False, 0, False,
        )
    return state


@triton.jit
def gated_chunk(
    q, k, v, o, x, shares, states, sums, left, state, scale, row_scale, key_scale, keep, rows, dims,
    values, D: tl.constexpr, E: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    MASK_D: tl.constexpr, MASK_E: tl.constexpr, TAIL: tl.constexpr,
    STEP: tl.constexpr, AGAINST: tl.constexpr, PARTS: tl.constexpr, KEEP: tl.constexpr,
    SHARES: tl.constexpr,
):
    """One chunk of ``gated_sweep``; all pointers are at its first token. Returns the state after it."""
    reached, ahead, total = end_factors(sums, rows, left, STEP, AGAINST, PARTS, TAIL)
    at = states
    if KEEP or SHARES:
        at = states + values[:, None] * D + dims[None, :]
    if KEEP:
        inside = (dims[None, :] < D) & (values[:, None] < E) & keep
        tl.store(at, state.to(states.dtype.element_ty), mask=inside)
    state, sum_ = chunk(
        q, k, v, o, x, at, left, state, sums, scale, reached * row_scale, ahead, key_scale, 0.0,
        tl.exp2(total), rows, dims, values, D, E, DTYPE, PRECISION, False, MASK_D, MASK_E, TAIL,
        STEP, AGAINST, PARTS, SHARES,
    )
    if SHARES:
        tl.store(shares + rows * STEP, sum_, mask=rows < left)
    return state


@triton.jit
def gated_sweep(
    q, k, v, o, x, shares, states, sums, q_step, k_step, v_step, o_step, x_step, length, state,
    scale, row_scale, key_scale, first_value, chunk_stride, keep, D: tl.constexpr, E: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, STEP: tl.constexpr,
    AGAINST: tl.constexpr, PARTS: tl.constexpr, KEEP: tl.constexpr, SHARES: tl.constexpr,
):
    """``sweep`` with gates; sums and shares are of the head, STEP 1 or -1 from token to token.

    states points at the unit's first chunk in the order of the tensor, one every chunk_stride:
    KEEP writes the state before each chunk to it where ``keep``, SHARES reads it and writes shares,
    with x, see ``chunk``.
    """
    rows, dims = tl.arange(0, C), tl.arange(0, BD)
    values = first_value + tl.arange(0, BE)
    q += rows[:, None] * q_step + dims[None, :]
    k += rows[:, None] * k_step + dims[None, :]
    v += values[:, None] + rows[None, :] * v_step
    o += values[:, None] + rows[None, :] * o_step
    if SHARES:
        x += values[:, None] + rows[None, :] * x_step
    MASK_D: tl.constexpr = D != BD
    MASK_E: tl.constexpr = E % BE != 0
    full = length // C
    left = (length - full * C).to(tl.int32)
    begin = 0
    if STEP < 0:
        begin = left
    if STEP < 0 and left > 0:
        state = gated_chunk(
            q, k, v, o, x, shares, states + full * chunk_stride, sums, left, state, scale,
            row_scale, key_scale, keep, rows, dims, values, D, E, DTYPE, PRECISION, MASK_D, MASK_E,
            True, STEP, AGAINST, PARTS, KEEP, SHARES,
        )
    for c in tl.range(0, full, num_stages=STAGES):
        at = begin + c * C
        n = c if STEP > 0 else full - 1 - c
        state = gated_chunk(
            q + at * q_step, k + at * k_step, v + at * v_step, o + at * o_step, x + at * x_step,
            shares + at * STEP, states + n * chunk_stride, sums + at * (STEP * PARTS), C, state,
            scale, row_scale, key_scale, keep, rows, dims, values, D, E, DTYPE, PRECISION, MASK_D,
            MASK_E, False, STEP, AGAINST, PARTS, KEEP, SHARES,
        )
    if STEP > 0 and left > 0:
        at = full * C
        state = gated_chunk(
            q + at * q_step, k + at * k_step, v + at * v_step, o + at * o_step, x + at * x_step,
            shares + at * STEP, states + full * chunk_stride, sums + at * (STEP * PARTS), left,
            state, scale, row_scale, key_scale, keep, rows, dims, values, D, E, DTYPE, PRECISION,
            MASK_D, MASK_E, True, STEP, AGAINST, PARTS, KEEP, SHARES,
        )
    return state


@triton.jit
def gated_sum(
    k, v, sums, k_step, v_step, length, scale, dims, values, D: tl.constexpr, E: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, STEP: tl.constexpr,
    AGAINST: tl.constexpr, PARTS: tl.constexpr,
):
    """What a unit adds to the state, times scale, and the log of its decay; see ``gated_sweep``."""
    rows = tl.arange(0, C)
    k += rows[:, None] * k_step + dims[None, :]
    v += values[:, None] + rows[None, :] * v_step
    state = tl.zeros([BE, BD], dtype=tl.float32)
    total = 0.0
    count = (length + C - 1) // C
    for c in tl.range(0, count, num_stages=STAGES):
        n = c if STEP > 0 else count - 1 - c
        left = tl.minimum(length - n * C, C).to(tl.int32)
        at = n * C
        if STEP < 0:
            at = length - n * C - left
        inside, here = rows[:, None] < left, rows[None, :] < left
        k_ = load_tile(k + at * k_step, inside, dims[None, :] < D, True, True, DTYPE)
        v_ = load_tile(v + at * v_step, here, values[:, None] < E, True, True, DTYPE)
        here = sums + at * (STEP * PARTS)
        _, ahead, decay = end_factors(here, rows, left, STEP, AGAINST, PARTS, True)
        total += decay
        state = add_to_state(state * tl.exp2(decay), k_, v_, ahead, scale, DTYPE, PRECISION)
    return state, total * LN_2
