"""Gradients of linear attention with gates, chunk by chunk, as Triton kernels.

With S the state that enters a chunk, R the gradient of the one that leaves it (``states_kernel``
writes both), D = scale * (dO V^T) on and below the diagonal and the names of ``triton_gated``:

    dV = scale * scores^T dO + leaving R
    dQ = [from D] + scale * exp(g_0 + .. + g_t) * (dO S^T)
    dK = [from D] + exp(g_{s+1} + .. + g_{C-1}) * (V R^T)

What comes from D is formed level by level, as the scores are: with B = D + D^T, restricted to the
pairs of a level, B u is the gradient of all u of the level at once.

The gradient of g_t is the sum of q dq = k dk over all pairs of a query at or after t and a key
before t. Each level adds those of its own pairs, of which t lies between u's token and the boundary,
so that every term is a share of the result: nothing cancels. (The usual form, a sum from t to the
end of q dq - k dk, adds what lies after t on both sides and subtracts it again; with products
rounded to 16 bits its error grows with the number of tokens that it runs over.) Pairs with tokens
of other chunks come from the products with S and R in the same way, and pairs that span the whole
chunk give exp(g_0 + .. + g_{C-1}) * (sum over values of S * R).

Legend as in ``triton_gated``.
"""

import triton
import triton.language as tl

from transnormer.ops.linear_attention.triton_constant import as_operand
from transnormer.ops.linear_attention.triton_gated import (
    decay_mask,
    decayed_by,
    decaying,
    decays_of,
    is_right,
    level_pairs,
    load_ones,
    load_vector,
    row_decays,
    split_gates,
    token_walk,
)
from transnormer.ops.linear_attention.triton_units import find_unit

# Arguments stand in lines as they belong together.
# fmt: off


@triton.jit(do_not_specialize=["T", "CHUNKS", "H", "G"])
def value_gradient_kernel(
    leaving, scores, v, do, out_states, d_scores, dv, table, v_batch, v_token, v_head, do_batch,
    do_token, do_head, T, CHUNKS, H, G, scale, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):
    """D, mirrored at its diagonal, [chunks, H, C, C], and dV, for one chunk and query head.

    out_states [chunks, H, K, V] are the gradients R of the states that leave chunks.
    """
    program = tl.program_id(0)
    head = program % H
    chunk = (program // H).to(tl.int64)
    sequence, row, start, length, _, _ = find_unit(chunk, table, T, C, CHUNKS, PACKED)
    if sequence < 0:
        return
    query_head, kv_head, kv_heads = head.to(tl.int64), (head // G).to(tl.int64), H // G
    index = chunk * H + query_head
    rows, dims = tl.arange(0, C), tl.arange(0, BK)
    v_at, v_step = token_walk(start, length, tl.cast(v_token, tl.int64), REVERSE)
    do_at, do_step = token_walk(start, length, tl.cast(do_token, tl.int64), REVERSE)
    dv_token = tl.cast(H, tl.int64) * V
    dv_at, dv_step = token_walk(start, length, dv_token, REVERSE)
    v += row * v_batch + v_at * v_token + kv_head * v_head
    do += row * do_batch + do_at * do_token + query_head * do_head
    dv += (row * T + dv_at) * dv_token + query_head * V
    out_states += index * (K * V)
    leaving += (chunk * kv_heads + kv_head) * (C * K)
    # Transposed by their addresses: [key position, query position].
    scores_ = tl.load(scores + index * (C * C) + rows[:, None] + rows[None, :] * C)
    scores_, factor = as_operand(scores_, DTYPE)
    sums = tl.zeros([C, C], dtype=tl.float32)
    for base in range(0, V, BV):
        values = base + tl.arange(0, BV)
        live = (rows[:, None] < length) & (values[None, :] < V)
        across = (rows[None, :] < length) & (values[:, None] < V)
        do_ = tl.load(do + rows[:, None] * do_step + values[None, :], mask=live, other=0.0)
        v_ = tl.load(v + rows[None, :] * v_step + values[:, None], mask=across, other=0.0)
        do_ = do_.to(DTYPE)
        sums = tl.dot(do_, v_.to(DTYPE), acc=sums, input_precision=PRECISION)
        out = tl.dot(scores_, do_, input_precision=PRECISION) * (factor * scale)
        for first in range(0, K, BK):
            inside = first + dims < K
            k_ = tl.load(
                leaving + rows[:, None] * K + first + dims[None, :], mask=inside[None, :], other=0.0
            )
            at = out_states + (first + dims[:, None]) * V + values[None, :]
            r_ = tl.load(at, mask=inside[:, None] & (values[None, :] < V), other=0.0)
            r_, r_factor = as_operand(r_, DTYPE)
            out += tl.dot(k_.to(DTYPE), r_, input_precision=PRECISION) * r_factor
        at = dv + rows[:, None] * dv_step + values[None, :]
        tl.store(at, out.to(dv.dtype.element_ty), mask=live)
    sums = (sums * scale).to(d_scores.dtype.element_ty)
    below = rows[:, None] >= rows[None, :]
    d_scores += index * (C * C)
    tl.store(d_scores + rows[:, None] * C + rows[None, :], sums, mask=below)
    tl.store(d_scores + rows[None, :] * C + rows[:, None], sums, mask=below)


@triton.jit
def state_products(
    v, do, states, out_states, v_step, do_step, rows, dims, length, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(dO S^T, V R^T, sum over values of S * R): [C, BK] twice and [BK]."""
    queries = tl.zeros([C, BK], dtype=tl.float32)
    keys = tl.zeros([C, BK], dtype=tl.float32)
    spans = tl.zeros([BK], dtype=tl.float32)
    for base in range(0, V, BV):
        values = base + tl.arange(0, BV)
        live = (rows[:, None] < length) & (values[None, :] < V)
        inside = (dims[None, :] < K) & (values[:, None] < V)
        offsets = dims[None, :] * V + values[:, None]
        do_ = tl.load(do + rows[:, None] * do_step + values[None, :], mask=live, other=0.0)
        v_ = tl.load(v + rows[:, None] * v_step + values[None, :], mask=live, other=0.0)
        s = tl.load(states + offsets, mask=inside, other=0.0)
        r = tl.load(out_states + offsets, mask=inside, other=0.0)
        s_, factor = as_operand(s, DTYPE)
        queries += tl.dot(do_.to(DTYPE), s_, input_precision=PRECISION) * factor
        r_, factor = as_operand(r, DTYPE)
        keys += tl.dot(v_.to(DTYPE), r_, input_precision=PRECISION) * factor
        spans += tl.sum(s.to(tl.float32) * r.to(tl.float32), 0)
    return queries, keys, spans


@triton.jit
def shares(which, ones, x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over the rows of x that each token takes part in: which [C, C] times x [C, BK]."""
    x_, factor = as_operand(x, DTYPE)
    which = tl.where(which, ones, 0.0).to(DTYPE)
    return tl.dot(which, x_, input_precision=PRECISION) * factor


@triton.jit
def column_shares(which, x):
    """The same for a number a row, x [C]: [C]."""
    return tl.sum(tl.where(which, x[None, :], 0.0), 1)


@triton.jit(do_not_specialize=["T", "CHUNKS", "H", "G"])
def key_gradient_kernel(
    q, k, v, do, g, ones, firsts, scores, d_scores, states, out_states, dq, dk, dg, table, q_batch,
    q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, do_batch, do_token,
    do_head, g_batch, g_token, g_head, T, CHUNKS, H, G, scale, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SCALAR: tl.constexpr, PARTS: tl.constexpr, WITH_DECAY: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients of q, k and log_decay for one chunk, query head and block of key dims.

    dq and dk are [batch, seq, H, K]; dg, float32, too, or [batch, seq, H, blocks] for a scalar gate.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    program = tl.program_id(0)
    block = program % BLOCKS
    head = (program // BLOCKS) % H
    chunk = (program // (BLOCKS * H)).to(tl.int64)
    sequence, row, start, length, _, _ = find_unit(chunk, table, T, C, CHUNKS, PACKED)
    if sequence < 0:
        return
    query_head, kv_head, kv_heads = head.to(tl.int64), (head // G).to(tl.int64), H // G
    index = chunk * H + query_head
    rows, dims = tl.arange(0, C), block * BK + tl.arange(0, BK)
    q_at, q_step = token_walk(start, length, tl.cast(q_token, tl.int64), REVERSE)
    k_at, k_step = token_walk(start, length, tl.cast(k_token, tl.int64), REVERSE)
    v_at, v_step = token_walk(start, length, tl.cast(v_token, tl.int64), REVERSE)
    do_at, do_step = token_walk(start, length, tl.cast(do_token, tl.int64), REVERSE)
    g_at, g_step = token_walk(start, length, tl.cast(g_token, tl.int64), REVERSE)
    live = (rows[:, None] < length) & (dims[None, :] < K)
    q += row * q_batch + q_at * q_token + query_head * q_head + rows[:, None] * q_step
    k += row * k_batch + k_at * k_token + kv_head * k_head + rows[:, None] * k_step
    g += row * g_batch + g_at * g_token + kv_head * g_head
    q_ = tl.load(q + dims[None, :], mask=live, other=0.0).to(DTYPE)
    k_ = tl.load(k + dims[None, :], mask=live, other=0.0).to(DTYPE)
    square = index * (C * C) + rows[:, None] * C + rows[None, :]
    pairs = tl.load(d_scores + square)
    ones = load_ones(ones, rows)
    earlier, later = rows[:, None] >= rows[None, :], rows[:, None] < rows[None, :]
    gated = (rows > 0) & (rows < length)
    if SCALAR:
        gates = tl.load(g + rows * g_step, mask=gated, other=0.0).to(tl.float32)
        masked = pairs.to(tl.float32) * decay_mask(gates, rows, LEVELS, C)
        masked, factor = as_operand(masked, DTYPE)
        here = tl.where(earlier, masked, 0.0).to(DTYPE)
        dq_ = tl.dot(here, k_, input_precision=PRECISION) * factor
        here = tl.where(rows[:, None] <= rows[None, :], masked, 0.0).to(DTYPE)
        dk_ = tl.dot(here, q_, input_precision=PRECISION) * factor
        dg_ = tl.zeros([C], dtype=tl.float32)
        if WITH_DECAY and block == 0:
            across = index * (C * C) + rows[None, :] * C + rows[:, None]
            terms = tl.where(earlier, tl.load(scores + square), tl.load(scores + across))
            terms = pairs.to(tl.float32) * terms.to(tl.float32)
            for level in range(0, LEVELS):
                own = tl.sum(tl.where(level_pairs(rows, level), terms, 0.0), 1)
                dg_ += column_shares(decaying(rows, level), own)
        prefix = row_decays(earlier, gates)[:, None]
        suffix = row_decays(later, gates)[:, None]
        inner = tl.sum(gates, 0)
    else:
        at = g + rows[:, None] * g_step + dims[None, :]
        gates = tl.load(at, mask=gated[:, None] & (dims[None, :] < K), other=0.0).to(tl.float32)
        inner = tl.sum(gates, 0)
        high, low = split_gates(gates, PARTS)
        diagonal = tl.load(d_scores + index * (C * C) + rows * (C + 1)).to(tl.float32)
        pairs, pair_factor = as_operand(pairs, DTYPE)
        dq_ = diagonal[:, None] * k_.to(tl.float32)
        dk_ = diagonal[:, None] * q_.to(tl.float32)
        dg_ = tl.zeros([C, BK], dtype=tl.float32)
        for level in range(0, LEVELS):
            right = is_right(rows, level)[:, None]
            factor = decays_of(decayed_by(rows, level), ones, high, low, PARTS)
            u = tl.where(right, q_, k_).to(tl.float32) * factor
            here = tl.where(level_pairs(rows, level), pairs, 0.0).to(DTYPE)
            du = tl.dot(here, u.to(DTYPE), input_precision=PRECISION) * pair_factor
            dq_ += tl.where(right, du * factor, 0.0)
            dk_ += tl.where(right, 0.0, du * factor)
            if WITH_DECAY:
                dg_ += shares(decaying(rows, level), ones, du * u, DTYPE, PRECISION)
        prefix = decays_of(earlier, ones, high, low, PARTS)
        suffix = decays_of(later, ones, high, low, PARTS)
    queries, keys, spans = state_products(
        v + row * v_batch + v_at * v_token + kv_head * v_head,
        do + row * do_batch + do_at * do_token + query_head * do_head,
        states + (chunk * kv_heads + kv_head) * (K * V), out_states + index * (K * V), v_step,
        do_step, rows, dims, length, K, V, C, BK, BV, DTYPE, PRECISION,
    )
    first = load_vector(firsts, chunk * kv_heads + kv_head, dims, K, SCALAR)
    queries = queries * (prefix * scale) * first[None, :]
    keys = keys * suffix
    if WITH_DECAY:
        before, after = queries * q_.to(tl.float32), keys * k_.to(tl.float32)
        spans = spans * tl.exp(inner) * first
        if SCALAR:
            dg_ += column_shares(rows[:, None] <= rows[None, :], tl.sum(before, 1))
            dg_ += column_shares(rows[:, None] > rows[None, :], tl.sum(after, 1))
            dg_ += tl.sum(spans, 0)
        else:
            dg_ += shares(rows[:, None] <= rows[None, :], ones, before, DTYPE, PRECISION)
            # No gate of the chunk is after its last token, whose share may be the largest by far.
            after = tl.where(rows[:, None] < length - 1, after, 0.0)
            dg_ += shares(rows[:, None] > rows[None, :], ones, after, DTYPE, PRECISION)
            dg_ += spans[None, :]
    token = tl.cast(H, tl.int64) * K
    at, step = token_walk(start, length, token, REVERSE)
    at = (row * T + at) * token + query_head * K + rows[:, None] * step + dims[None, :]
    tl.store(dq + at, (dq_ + queries).to(dq.dtype.element_ty), mask=live)
    tl.store(dk + at, (dk_ + keys).to(dk.dtype.element_ty), mask=live)
    if WITH_DECAY:
        if SCALAR:
            token = tl.cast(H, tl.int64) * BLOCKS
            at, step = token_walk(start, length, token, REVERSE)
            at = (row * T + at) * token + query_head * BLOCKS + block + rows * step
            tl.store(dg + at, dg_, mask=rows < length)
        else:
            tl.store(dg + at, dg_, mask=live)
