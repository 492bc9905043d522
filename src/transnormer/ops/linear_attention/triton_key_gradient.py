"""Gradients of q, k and a key gate's log_decay, chunk by chunk, as a Triton kernel.

With S, R and D as in ``triton_gated_gradient``; c_t the sum of the gates up to a token, m the middle
of its block (the chunk, where it is near), decays a and b of the chunk up to its middle and
from it on:

    y_t = q_t exp(c_t - c_m)    dy_t = sum over s < t of D_ts x_s + scale * a * (dO S^T)_t
    x_s = k_s exp(c_m - c_s)    dx_s = sum over t > s of D_ts y_t + b * (V R^T)_s
    dQ_t = exp(c_t - c_m) dy_t + D_tt k_t        dK_s = exp(c_m - c_s) dx_s + D_ss q_s

g_j takes part in the pairs of a query at or after j and a key before j, which are

    sum over t >= j of (y_t dy_t - x_t dx_t)  +  sum over all s of b x_s (V R^T)_s  +  a b sum_v S R

A pair at or after j is in the first sum twice and cancels: with y and x rounded as the products have
them both terms are the same number up to float32 rounding, and a sum runs over one chunk only. The
pair of a token with itself, which no gate decays, would be larger than all others by any factor where
decay is strong, as would the last token's share of b x V R^T; they are left out of both sides. The
sum over t >= j is a product with a matrix of 0 and 1, in two parts of 16 bits.

Blocks that are not near: pairs of different blocks come level by level as their scores do. With D
mirrored at its diagonal and restricted to the pairs of a level, D u is the gradient of all u of the
level at once, and u du is added over the tokens between u's and the boundary: every term is a share
of the result. Rounded u would not do there, since a float16 is 0 where decay is strong.

Legend as in ``triton_gated``; BN the key dims that have the same blocks.
"""

import triton
import triton.language as tl

from transnormer.ops.linear_attention.triton_arithmetic import as_operand
from transnormer.ops.linear_attention.triton_gated import (
    _LOG2_E,
    _NOTHING,
    decayed_by,
    decaying,
    decays_of,
    from_middle,
    is_right,
    level_pairs,
    load_ones,
    split_gates,
    token_walk,
)
from transnormer.ops.linear_attention.triton_gated_gradient import state_products
from transnormer.ops.linear_attention.triton_units import find_unit

# Arguments stand in lines as they belong together.
# fmt: off


@triton.jit
def load_halves(halves, gate, dims, K: tl.constexpr):
    """Sums of a chunk's gates up to its middle and behind it, as gates_kernel writes them."""
    at = halves + gate * (2 * K) + dims
    return tl.load(at, mask=dims < K, other=0.0), tl.load(at + K, mask=dims < K, other=0.0)


@triton.jit
def shares_of(which, ones, x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over the rows of x [C, BK] that ``which`` [C, C] selects for each row."""
    x_, factor = as_operand(x, DTYPE)
    which = tl.where(which, ones, 0.0).to(DTYPE)
    return tl.dot(which, x_, input_precision=PRECISION) * factor


@triton.jit
def sums_behind(x, ones, rows, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over the rows of x [C, BK] from each one on, about as exact as float32 sums.

    x is rounded to two parts, since much of it may cancel.
    """
    which = tl.where(rows[:, None] <= rows[None, :], ones, 0.0).to(DTYPE)
    high, factor = as_operand(x, DTYPE)
    sums = tl.dot(which, high, input_precision=PRECISION) * factor
    if DTYPE != tl.float32:
        low, rest = as_operand(x - high.to(tl.float32) * factor, DTYPE)
        sums += tl.dot(which, low, input_precision=PRECISION) * rest
    return sums


@triton.jit
def block_gradients(
    q_, k_, queries, keys, middle, pairs, factor, diagonal, rows, blocks, last,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):
    """(dQ, dK, y dy - x dx, sum over s of b x V R^T), the first three [C, BK].

    queries and keys are scale * a * (dO S^T) and b * (V R^T); pairs times factor is D and diagonal its
    diagonal. Tokens of the same number in ``blocks`` are pairs.
    """
    same = blocks[:, None] == blocks[None, :]
    q_decay, k_decay = tl.exp2(middle), tl.exp2(-middle)
    y, y_factor = as_operand(q_.to(tl.float32) * q_decay, DTYPE)
    x, x_factor = as_operand(k_.to(tl.float32) * k_decay, DTYPE)
    here = tl.where(same & (rows[:, None] < rows[None, :]), pairs, 0.0).to(DTYPE)
    dx = tl.dot(here, y, input_precision=PRECISION) * (factor * y_factor)
    x32, y32 = x.to(tl.float32) * x_factor, y.to(tl.float32) * y_factor
    # No gate of the chunk is behind its last token.
    after = tl.where((rows == last)[:, None], 0.0, keys * x32)
    weights = -(dx * x32) - after
    keys = (keys + dx + diagonal * y32) * k_decay
    here = tl.where(same & (rows[:, None] > rows[None, :]), pairs, 0.0).to(DTYPE)
    queries += tl.dot(here, x, input_precision=PRECISION) * (factor * x_factor)
    weights += queries * y32
    queries = (queries + diagonal * x32) * q_decay
    return queries, keys, weights, tl.sum(after, 0)


@triton.jit(do_not_specialize=["T", "CHUNKS", "H", "G"])
def key_gradient_kernel(
    q, k, v, do, g, ones, firsts, halves, near, levels, d_scores, states, out_states, dq, dk, dg, table, q_batch,
    q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, do_batch, do_token,
    do_head, g_batch, g_token, g_head, T, CHUNKS, H, G, scale, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    NEAR: tl.constexpr, PARTS: tl.constexpr, WITH_DECAY: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients of q, k and log_decay for one chunk, query head and block of key dims.

    dq, dk and dg, float32, are [batch, seq, H, K]. NEAR: of chunks that are near, else of the others,
    whose blocks have the size of ``levels`` [chunks, H / G, key blocks of BN]. They are programs of
    two launches since those for the others need registers that would be missed here. Which of them a
    program belongs to is read from memory: all warps see the same, with nothing to wait for.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    program = tl.program_id(0)
    dims = program % BLOCKS * BK + tl.arange(0, BK)
    head = (program // BLOCKS) % H
    chunk = (program // (BLOCKS * H)).to(tl.int64)
    sequence, row, start, length, _, _ = find_unit(chunk, table, T, C, CHUNKS, PACKED)
    if sequence < 0:
        return
    query_head, kv_head, kv_heads = head.to(tl.int64), (head // G).to(tl.int64), H // G
    gate = chunk * kv_heads + kv_head
    if (tl.load(near + gate) != 0) != NEAR:
        return
    lead, trail = load_halves(halves, gate, dims, K)
    index = chunk * H + query_head
    rows = tl.arange(0, C)
    q_at, q_step = token_walk(start, length, tl.cast(q_token, tl.int64), REVERSE)
    k_at, k_step = token_walk(start, length, tl.cast(k_token, tl.int64), REVERSE)
    v_at, v_step = token_walk(start, length, tl.cast(v_token, tl.int64), REVERSE)
    do_at, do_step = token_walk(start, length, tl.cast(do_token, tl.int64), REVERSE)
    g_at, g_step = token_walk(start, length, tl.cast(g_token, tl.int64), REVERSE)
    live = (rows[:, None] < length) & (dims[None, :] < K)
    q += row * q_batch + q_at * q_token + query_head * q_head + rows[:, None] * q_step
    k += row * k_batch + k_at * k_token + kv_head * k_head + rows[:, None] * k_step
    g += row * g_batch + g_at * g_token + kv_head * g_head + rows[:, None] * g_step
    first = tl.load(firsts + gate * K + dims, mask=dims < K, other=0.0)
    scaled = first * scale
    # The first token's gate stands apart.
    gates = tl.load(g + dims[None, :], mask=live & (rows > 0)[:, None], other=0.0)
    high, low = split_gates(tl.maximum(gates.to(tl.float32) * _LOG2_E, _NOTHING), 2)
    q_ = tl.load(q + dims[None, :], mask=live, other=0.0).to(DTYPE)
    k_ = tl.load(k + dims[None, :], mask=live, other=0.0).to(DTYPE)
    d_scores += index * (C * C)
    pairs, factor = as_operand(tl.load(d_scores + rows[:, None] * C + rows[None, :]), DTYPE)
    diagonal = tl.load(d_scores + rows * (C + 1)).to(tl.float32)[:, None]
    queries, keys, spans = state_products(
        v + row * v_batch + v_at * v_token + kv_head * v_head,
        do + row * do_batch + do_at * do_token + query_head * do_head,
        states + gate * (K * V), out_states + index * (K * V), v_step, do_step, rows, dims, length,
        K, V, C, BK, BV, DTYPE, PRECISION,
    )
    spans *= tl.exp2(lead + trail) * first
    behind = tl.zeros([C, BK], dtype=tl.float32)
    if NEAR:
        middle = from_middle(rows, LEVELS, load_ones(ones, rows), high, low, 2)
        queries *= (scaled * tl.exp2(lead))[None, :]
        keys *= tl.exp2(trail)[None, :]
        queries, keys, weights, after = block_gradients(
            q_, k_, queries, keys, middle, pairs, factor, diagonal, rows, rows * 0, length - 1,
            DTYPE, PRECISION,
        )
    else:
        ones_ = load_ones(ones, rows)
        wide_blocks: tl.constexpr = (K + BN - 1) // BN
        base = tl.load(levels + gate * wide_blocks + program % BLOCKS * BK // BN)
        queries *= scaled[None, :]
        queries *= decays_of(rows[:, None] >= rows[None, :], ones_, high, low, PARTS)
        keys *= decays_of(rows[:, None] < rows[None, :], ones_, high, low, PARTS)
        shares = tl.where((rows == length - 1)[:, None], 0.0, keys * k_.to(tl.float32))
        after = tl.sum(shares, 0)
        weights = queries * q_.to(tl.float32) - shares
        for level in range(base, LEVELS):
            right = is_right(rows, level)[:, None]
            decay = decays_of(decayed_by(rows, level), ones_, high, low, PARTS)
            u = tl.where(right, q_, k_).to(tl.float32) * decay
            here = tl.where(level_pairs(rows, level), pairs, 0.0).to(DTYPE)
            du = tl.dot(here, u.to(DTYPE), input_precision=PRECISION) * factor
            if WITH_DECAY:
                behind += shares_of(decaying(rows, level), ones_, du * u, DTYPE, PRECISION)
            du *= decay
            queries += tl.where(right, du, 0.0)
            keys += tl.where(right, 0.0, du)
        middle = from_middle(rows, base, ones_, high, low, PARTS)
        zero = tl.zeros([C, BK], dtype=tl.float32)
        dq_, dk_, own, nothing = block_gradients(
            q_, k_, zero, zero, middle, pairs, factor, diagonal, rows, rows >> base, length - 1,
            DTYPE, PRECISION,
        )
        queries += dq_
        keys += dk_
        weights += own
    token = tl.cast(H, tl.int64) * K
    at, step = token_walk(start, length, token, REVERSE)
    at = (row * T + at) * token + query_head * K + rows[:, None] * step + dims[None, :]
    tl.store(dq + at, queries.to(dq.dtype.element_ty), mask=live)
    tl.store(dk + at, keys.to(dk.dtype.element_ty), mask=live)
    if WITH_DECAY:
        dg_ = sums_behind(weights, load_ones(ones, rows), rows, DTYPE, PRECISION)
        dg_ += (spans + after)[None, :]
        # A gate that leaves nothing has no gradient, not the rounding errors of what cancels.
        if NEAR:
            # Only the first token's gate, which stands apart, can be one.
            nothing_left = (rows == 0)[:, None] & (first == 0.0)[None, :]
        else:
            gates = tl.load(g + dims[None, :], mask=live, other=0.0).to(tl.float32)
            dg_ += behind
            nothing_left = gates * _LOG2_E <= _NOTHING
        tl.store(dg + at, tl.where(nothing_left, 0.0, dg_), mask=live)
