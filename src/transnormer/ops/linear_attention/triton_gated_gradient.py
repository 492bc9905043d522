"""Gradients of linear attention with gates, chunk by chunk, as Triton kernels.

With S the state that enters a chunk, R the gradient of the one that leaves it (``states_kernel``
writes both), D = scale * (dO V^T) on and below the diagonal and the names of ``triton_gated``:

    dV = scale * scores^T dO + leaving R
    dQ = [from D] + scale * exp(g_0 + .. + g_t) * (dO S^T)
    dK = [from D] + exp(g_{s+1} + .. + g_{C-1}) * (V R^T)

The first is here, the others are ``triton_key_gradient``'s.

Legend as in ``triton_gated``.
"""

import triton
import triton.language as tl

from transnormer.ops.linear_attention.triton_arithmetic import as_operand
from transnormer.ops.linear_attention.triton_gated import token_walk
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
    below = tl.zeros([C, C], dtype=tl.float32)
    above = tl.zeros([C, C], dtype=tl.float32)
    for base in range(0, V, BV):
        values = base + tl.arange(0, BV)
        live = (rows[:, None] < length) & (values[None, :] < V)
        do_ = tl.load(do + rows[:, None] * do_step + values[None, :], mask=live, other=0.0)
        v_ = tl.load(v + rows[:, None] * v_step + values[None, :], mask=live, other=0.0)
        do_, v_ = do_.to(DTYPE), v_.to(DTYPE)
        # The mirrored half is a product of its own: stores of a transposed tile are 2 bytes wide.
        below = tl.dot(do_, tl.trans(v_), acc=below, input_precision=PRECISION)
        above = tl.dot(v_, tl.trans(do_), acc=above, input_precision=PRECISION)
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
    sums = tl.where(rows[:, None] >= rows[None, :], below, above) * scale
    d_scores += index * (C * C) + rows[:, None] * C + rows[None, :]
    tl.store(d_scores, sums.to(d_scores.dtype.element_ty))


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
    # At least two rounds: a loop of one is dissolved, and its tiles then share memory with those
    # behind it in ways that ptxas 12.8 makes wrong addresses of.
    for base in range(0, max(V, 2 * BV), BV):
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
