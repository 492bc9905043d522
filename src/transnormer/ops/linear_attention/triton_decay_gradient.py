"""The gradient of a constant log_decay, chunk by chunk, as a Triton kernel.

With S' the derivative of the state S by g = log_decay, the derivative of the outputs is

    O' = [(Q K^T) * M * (i - j)] V + exp(g (i + 1)) * Q (S' + (i + 1) S)
    S' = exp(g C) (S' + C S) + sum over j of (C - 1 - j) exp(g (C - 1 - j)) k_j v_j^T

and g's gradient is the sum of dO * O'. S' starts from 0 in each unit; the distance that its entry
state still has to go there, and what the unit does to later ones, is <S' at the unit's end,
gradient of the state that leaves it>. No difference of sums over the whole sequence is formed: such
a form loses all digits at length, because products are rounded to bfloat16.

Legend as in ``triton_constant``.
"""

import triton
import triton.language as tl

from transnormer.ops.linear_attention.triton_arithmetic import (
    as_operand,
    decay_state,
    load_tile,
    power,
    product,
    split_decay,
)
from transnormer.ops.linear_attention.triton_constant import entered, load_decay, load_state
from transnormer.ops.linear_attention.triton_units import find_unit

# Arguments stand in lines as they belong together.
# fmt: off


@triton.jit
def derivative_chunk(
    q, k, v, do, left, state, slope, total, mask, row_decay, weight, kept, rest, size, rows, dims,
    values, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):
    """One chunk; ``slope`` is S', ``total`` the sum so far, ``size`` its number of tokens."""
    inside, here = rows[:, None] < left, rows[None, :] < left
    q_ = load_tile(q, inside, dims[None, :] < D, True, True, DTYPE)
    k_ = load_tile(k, inside, dims[None, :] < D, True, True, DTYPE)
    v_ = load_tile(v, here, values[:, None] < E, True, True, DTYPE)
    do_ = load_tile(do, here, values[:, None] < E, True, True, tl.float32)
    ahead = (rows + 1).to(tl.float32)
    behind = (left - 1 - rows).to(tl.float32)
    distance = (rows[None, :] - rows[:, None]).to(tl.float32)
    out = product(state, tl.trans(q_), DTYPE, PRECISION) * (row_decay * ahead)[None, :]
    out += product(slope, tl.trans(q_), DTYPE, PRECISION) * row_decay[None, :]
    p = tl.dot(k_, tl.trans(q_), input_precision=PRECISION) * mask * distance
    p_, factor = as_operand(p, DTYPE)
    out += tl.dot(v_, p_, input_precision=PRECISION) * factor
    total += tl.sum(tl.sum(out * do_, 1), 0)
    far = v_.to(tl.float32) * (weight * behind)[None, :]
    slope = decay_state(slope + size * state, kept, rest, EXACT) + product(
        far, k_, DTYPE, PRECISION
    )
    near = v_.to(tl.float32) * weight[None, :]
    state = decay_state(state, kept, rest, EXACT) + product(near, k_, DTYPE, PRECISION)
    return state, slope, total


@triton.jit(do_not_specialize=["T", "L", "SEGMENTS", "H", "G"])
def decay_gradient_kernel(
    q, k, v, do, log_decay, entry, grad_entry, out, table, q_batch, q_token, q_head, k_batch,
    k_token, k_head, v_batch, v_token, v_head, do_batch, do_token, do_head, T, L, SEGMENTS, H, G,
    scale, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    ENTRY: tl.constexpr, GRAD_ENTRY: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):
    """The share of one unit, query head and slice of values, out [units, H, slices] float32."""
    SLICES: tl.constexpr = (V + BE - 1) // BE
    program = tl.program_id(0)
    piece = program % SLICES
    head = (program // SLICES) % H
    unit = program // (SLICES * H)
    sequence, row, start, length, first, last = find_unit(unit, table, T, L, SEGMENTS, PACKED)
    if sequence < 0:
        tl.store(out + program, 0.0)
        return
    query_head, kv_head = head.to(tl.int64), (head // G).to(tl.int64)
    kv_heads = H // G
    g = load_decay(log_decay, kv_head, True)
    rows, dims = tl.arange(0, C), tl.arange(0, BD)
    values = piece * BE + tl.arange(0, BE)
    state = tl.zeros([BE, BD], dtype=tl.float32)
    slope = tl.zeros([BE, BD], dtype=tl.float32)
    if ENTRY != "none":
        index = (sequence if ENTRY == "sequence" else unit.to(tl.int64)) * kv_heads + kv_head
        enters = entered(ENTRY, last if REVERSE else first)
        state = load_state(entry, index, V, 1, dims, values, K, V, enters)
    at, direction = start, 1
    if REVERSE:
        at, direction = start + length - 1, -1
    q += row * q_batch + at * q_token + query_head * q_head
    k += row * k_batch + at * k_token + kv_head * k_head
    v += row * v_batch + at * v_token + kv_head * v_head
    do += row * do_batch + at * do_token + query_head * do_head
    q_token, k_token = (
        tl.cast(q_token, tl.int64) * direction,
        tl.cast(k_token, tl.int64) * direction,
    )
    v_token = tl.cast(v_token, tl.int64) * direction
    do_token = tl.cast(do_token, tl.int64) * direction
    q_tile = q + rows[:, None] * q_token + dims[None, :]
    k_tile = k + rows[:, None] * k_token + dims[None, :]
    v_tile = v + values[:, None] + rows[None, :] * v_token
    do_tile = do + values[:, None] + rows[None, :] * do_token
    mask = power(g, rows[None, :] - rows[:, None])
    row_decay = power(g, rows + 1)
    total = 0.0
    for c in range(0, tl.cdiv(length, C)):
        at = c * C
        left = tl.minimum(length - at, C).to(tl.int32)
        weight = tl.where(rows < left, power(g, left - 1 - rows), 0.0)
        kept, rest = split_decay(g * left)
        state, slope, total = derivative_chunk(
            q_tile + at * q_token, k_tile + at * k_token, v_tile + at * v_token,
            do_tile + at * do_token, left, state, slope, total, mask, row_decay, weight, kept,
            rest, left.to(tl.float32), rows, dims, values, K, V, C, DTYPE, PRECISION, EXACT,
        )
    total = total * scale
    if GRAD_ENTRY == "sequence":
        ends = first if REVERSE else last
        owner = (head % G == 0) & ends
        left_gradient = load_state(
            grad_entry, sequence * kv_heads + kv_head, V, 1, dims, values, K, V, owner
        )
        total += tl.sum(tl.sum(slope * left_gradient, 1), 0)
    elif GRAD_ENTRY != "none":
        index = unit.to(tl.int64) * H + head
        enters = entered(GRAD_ENTRY, first if REVERSE else last)
        left_gradient = load_state(grad_entry, index, V, 1, dims, values, K, V, enters)
        total += tl.sum(tl.sum(slope * left_gradient, 1), 0)
    tl.store(out + program, total)
