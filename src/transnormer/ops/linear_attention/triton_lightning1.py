"""Lightning Attention 1: the first paper's quadratic tiles as Triton kernels, constant decay.

    O_i = scale * sum over j <= i of [(Q_i K_j^T) * M_ij] V_j + scale * exp(g (t + 1)) Q_i S_0
    M_ts = exp(g (t - s)) for t >= s, 0 otherwise        (g = log_decay <= 0, per head)

Layout [batch, seq, heads, dim] with any strides but a contiguous last dim; states are
[key_dim, value_dim], float32. Source: Qin et al. 2023, arXiv:2307.14995, algorithms 1 and 2.

One program has a tile of M queries and walks all tiles of N keys up to its own: memory is linear in
length, time quadratic. Tiles that have decayed to nothing are not left out, although they could be:
this form is what Lightning Attention 2 is compared with. With i0 the tile's first position, the
mask below the diagonal is a product of two vectors, both with exponents g * (0 or more) <= 0:

    M_ij = exp(g (i - i0)) * exp(g (i0 - j))        (j < i0 <= i)

The first factor is the same for all keys, so it multiplies the sum once, when the walk reaches the
diagonal; what comes from the initial state is a part of that sum.

The backward pass is the same kernel with the roles exchanged (G = O's gradient): dQ from (G, V, K)
in the order of the forward pass, dK from (V, G, Q) and dV from (K, Q, G) against it. There the
final state's gradient enters as the initial state does, one token less decayed (SHIFT 1). The paper
has no states; ``leaving_state_kernel`` sums them as its successor does, in linear time.

Legend: H heads, G query heads a kv head, T tokens of a batch row, M and N tokens of a tile of
queries and of keys, C tokens of a chunk, D key dim and E value dim of a product; BD, BE their tile
sizes. Positions count from a sequence's first token in the order of the walk.
"""

import triton
import triton.language as tl

from transnormer.ops.linear_attention.triton_arithmetic import (
    add_to_state,
    decay_state,
    load_tile,
    power,
    split_decay,
)
from transnormer.ops.linear_attention.triton_constant import load_decay, load_state, store_state
from transnormer.ops.linear_attention.triton_units import find_unit, load_bounds


@triton.jit
def add_product(total, a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, a rounded to DTYPE first.

    A float16 would overflow where the float32 sum does not, or lose the digits of what has decayed,
    so a is scaled to a largest entry of 1,024; entries that are below 1e-30 all lose theirs, which
    keeps the scale itself above 0.
    """
    if DTYPE == tl.float16:
        factor = tl.maximum(tl.max(tl.max(tl.abs(a), 1), 0) / 1024.0, 1e-30)
        total += tl.dot((a / factor).to(DTYPE), b, input_precision=PRECISION) * factor
    else:
        total = tl.dot(a.to(DTYPE), b, acc=total, input_precision=PRECISION)
    return total


@triton.jit
def sequence_bounds(cu_seqlens, sequence, T, PACKED: tl.constexpr):
    """First token of a sequence and the one behind its last, int64, in its batch row."""
    if PACKED:
        begin, end = load_bounds(cu_seqlens, sequence, T, sequence >= 0)
    else:
        begin, end = tl.cast(0, tl.int64), tl.cast(T, tl.int64)
    return begin, end


@triton.jit
def entering(
    q,
    entry,
    index,
    row_inside,
    values,
    wanted,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    PIECE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Q S of a tile, [M, BE]; q are pointers to the rows' first dims, [M, 1].

    State ``index`` of ``entry`` is [D, E], or [E, D] where TRANSPOSED. It is read in pieces of
    PIECE dims, which fit the registers for every D.
    """
    d_stride, e_stride = E, 1
    if TRANSPOSED:
        d_stride, e_stride = 1, D
    out = tl.zeros([M, BE], dtype=tl.float32)
    for first in tl.range(0, BD, PIECE, num_stages=1):
        dims = first + tl.arange(0, PIECE)
        q_ = load_tile(q + dims[None, :], row_inside, dims[None, :] < D, True, True, DTYPE)
        state = load_state(entry, index, e_stride, d_stride, values, dims, E, D, wanted)
        if DTYPE == tl.float16:
            top = tl.maximum(tl.max(tl.max(tl.abs(state), 1), 0) / 1024.0, 1e-30)
            out += tl.dot(q_, (state / top).to(DTYPE), input_precision=PRECISION) * top
        else:
            out = tl.dot(q_, state.to(DTYPE), acc=out, input_precision=PRECISION)
    return out


@triton.jit(
    do_not_specialize=["T", "SEGMENTS", "UNITS", "H", "Q_GROUP", "K_GROUP", "G", "state_scale"]
)
def quadratic_kernel(
    q,
    k,
    v,
    log_decay,
    entry,
    o,
    table,
    cu_seqlens,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    T,
    SEGMENTS,
    UNITS,
    H,
    Q_GROUP,
    K_GROUP,
    G,
    state_scale,
    scale,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    ENTRY: tl.constexpr,
    SHIFT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CONSTANT: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs of one tile of queries, head and slice of values; o is [batch, T, H, E].

    A unit of ``find_unit`` is one tile. Reads q at head h // Q_GROUP, k and v at h // K_GROUP,
    log_decay at h // G and ``entry`` [sequences, H / G, ..] there too; with SHIFT 1 it belongs to
    the first head of a group alone. The longest walks come first, and programs side by side walk
    the same keys, which then are in the L2 cache.
    """
    SLICES: tl.constexpr = (E + BE - 1) // BE
    MASK_D: tl.constexpr = D != BD
    MASK_E: tl.constexpr = E % BE != 0
    program = tl.program_id(0)
    values = (program % SLICES) * BE + tl.arange(0, BE)
    unit = UNITS - 1 - (program // SLICES) % UNITS
    head = program // (SLICES * UNITS)
    sequence, row, start, length, _, _ = find_unit(unit, table, T, M, SEGMENTS, PACKED)
    if sequence < 0:
        return
    begin, end = sequence_bounds(cu_seqlens, sequence, T, PACKED)
    # The order against the tensors' is a walk from the last token with negative steps.
    origin, direction = begin, 1
    if REVERSE:
        origin, direction = end - 1, -1
    first, left = (start - begin).to(tl.int32), length.to(tl.int32)
    g = load_decay(log_decay, head // G, CONSTANT)
    rows, keys, dims = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BD)
    q += row * q_batch + origin * q_token + (head // Q_GROUP).to(tl.int64) * q_head
    k += row * k_batch + origin * k_token + (head // K_GROUP).to(tl.int64) * k_head
    v += row * v_batch + origin * v_token + (head // K_GROUP).to(tl.int64) * v_head
    o_token = tl.cast(H, tl.int64) * E
    o += (row * T + origin) * o_token + head.to(tl.int64) * E
    q_token = tl.cast(q_token, tl.int64) * direction
    k_token = tl.cast(k_token, tl.int64) * direction
    v_token = tl.cast(v_token, tl.int64) * direction
    o_token = o_token * direction
    row_inside = (rows < left)[:, None]
    q_row = q + (first + rows)[:, None] * q_token
    q_ = load_tile(q_row + dims[None, :], row_inside, dims[None, :] < D, True, MASK_D, DTYPE)
    k_tile = k + keys[:, None] * k_token + dims[None, :]
    v_tile = v + keys[:, None] * v_token + values[None, :]
    total = tl.zeros([M, BE], dtype=tl.float32)
    if ENTRY:
        index = sequence * (H // G) + head // G
        wanted = (SHIFT == 0) | (head % G == 0)
        total = entering(
            q_row, entry, index, row_inside, values, wanted, M, D, E, BD, BE, min(BD, 64),
            TRANSPOSED, DTYPE, PRECISION,
        )  # fmt: skip
        total *= power(g, first + 1 - SHIFT) * state_scale
    weight = power(g, N - 1 - keys) * scale
    for t in tl.range(0, first, N, num_stages=STAGES):
        k_ = load_tile(k_tile + t * k_token, True, dims[None, :] < D, False, MASK_D, DTYPE)
        v_ = load_tile(v_tile + t * v_token, True, values[None, :] < E, False, MASK_E, DTYPE)
        p = tl.dot(q_, tl.trans(k_), input_precision=PRECISION)
        p = p * (weight * power(g, first - t - N + 1))[None, :]
        total = add_product(total, p, v_, DTYPE, PRECISION)
    total *= power(g, rows)[:, None]
    # Not pipelined: it is too short a loop, and would need shared memory of its own.
    for t in tl.range(0, left, N, num_stages=1):
        inside = (t + keys < left)[:, None]
        at = first + t
        k_ = load_tile(k_tile + at * k_token, inside, dims[None, :] < D, True, MASK_D, DTYPE)
        v_ = load_tile(v_tile + at * v_token, inside, values[None, :] < E, True, MASK_E, DTYPE)
        p = tl.dot(q_, tl.trans(k_), input_precision=PRECISION)
        p = p * (power(g, rows[:, None] - (t + keys)[None, :]) * scale)
        total = add_product(total, p, v_, DTYPE, PRECISION)
    at = o + (first + rows)[:, None] * o_token + values[None, :]
    tl.store(at, total.to(o.dtype.element_ty), mask=row_inside & (values[None, :] < E))


@triton.jit(do_not_specialize=["T", "SEQUENCES", "PIECES", "H", "G"])
def leaving_state_kernel(
    k,
    v,
    log_decay,
    initial,
    states,
    cu_seqlens,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    T,
    SEQUENCES,
    PIECES,
    H,
    G,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    SHIFT: tl.constexpr,
    INITIAL: tl.constexpr,
    CONSTANT: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Shares of the states that leave the sequences, [PIECES, SEQUENCES, H, K, V].

        S = exp(g n) S_0 + sum over j < n of exp(g (n - 1 - j + SHIFT)) scale k_j v_j^T

    A program has one of PIECES equal parts of a sequence's n tokens; S_0, ``initial`` [SEQUENCES,
    H / G, K, V], belongs to the first part and the first head of each group. Their sum is S.
    """
    SLICES: tl.constexpr = (V + BE - 1) // BE
    program = tl.program_id(0)
    values = (program % SLICES) * BE + tl.arange(0, BE)
    piece = (program // SLICES) % PIECES
    head = (program // (SLICES * PIECES)) % H
    sequence = (program // (SLICES * PIECES * H)).to(tl.int64)
    begin, end = sequence_bounds(cu_seqlens, sequence, T, PACKED)
    row = sequence
    if PACKED:
        row = sequence * 0
    origin, direction = begin, 1
    if REVERSE:
        origin, direction = end - 1, -1
    n = (end - begin).to(tl.int32)
    size = tl.cdiv(tl.cdiv(n, PIECES), C) * C
    first = tl.minimum(piece * size, n)
    stop = tl.minimum(first + size, n)
    g = load_decay(log_decay, head // G, CONSTANT)
    rows, dims = tl.arange(0, C), tl.arange(0, BD)
    k += row * k_batch + origin * k_token + head.to(tl.int64) * k_head
    v += row * v_batch + origin * v_token + head.to(tl.int64) * v_head
    k_token = tl.cast(k_token, tl.int64) * direction
    v_token = tl.cast(v_token, tl.int64) * direction
    k_tile = k + rows[:, None] * k_token + dims[None, :]
    v_tile = v + values[:, None] + rows[None, :] * v_token
    state = tl.zeros([BE, BD], dtype=tl.float32)
    for at in tl.range(first, stop, C, num_stages=STAGES):
        left = tl.minimum(stop - at, C)
        inside, here = (rows < left)[:, None], (rows < left)[None, :]
        k_ = load_tile(k_tile + at * k_token, inside, dims[None, :] < K, True, True, DTYPE)
        v_ = load_tile(v_tile + at * v_token, here, values[:, None] < V, True, True, DTYPE)
        weight = tl.where(rows < left, power(g, left - 1 - rows), 0.0)
        kept, rest = split_decay(g * left)
        state = decay_state(state, kept, rest, EXACT)
        state = add_to_state(state, k_, v_, weight, 1.0, DTYPE, PRECISION)
    # What all terms share stays out of the weights, whose rounding a float16 could not hold.
    state *= power(g, n - stop + SHIFT) * scale
    if INITIAL:
        wanted = (piece == 0) & (head % G == 0)
        index = sequence * (H // G) + head // G
        state += power(g, n) * load_state(initial, index, V, 1, dims, values, K, V, wanted)
    index = (tl.cast(piece, tl.int64) * SEQUENCES + sequence) * H + head
    store_state(states, index, state, V, 1, dims, values, K, V)
