"""The ring step as kernels: the state is read once a step and written once in many.

A ring of C entries holds the keys k_j and values v_j of the last n tokens beside a state S that
knows all tokens before them. With lam = exp(log_decay), log_decay <= 0 constant per head:

    o_t = scale * (lam^(n + t + 1) q_t S + sum_{j <= n + t} lam^(n + t - j) (q_t . k_j) v_j),

entries n, n + 1, ... being the new tokens. Where they would not fit, the oldest F = C / 2 entries
are folded first: S = lam^F S + sum_{j < F} lam^(F - 1 - j) k_j v_j^T. Each row of the batch
decides that by its own length, on the device.

Layout: q [B, T, H * G, K], k [B, T, H, K], v [B, T, H, V]; state [rows, H, K, V] float32; keys
[rows, C, H, K], values [rows, C, H, V]; start and length int32 [rows]: entry j lies at
(start + j) % C. All arithmetic is float32. Two launches: programs of the first, which are many to a
row, read the ring and the lengths that the second writes.
Source: Qin et al. 2024, arXiv:2401.04658 (the recurrent form, unrolled over C tokens).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.linear_attention.launch_config import block_of
from transnormer.ops.linear_attention.triton_arithmetic import power, split_decay
from transnormer.ops.linear_attention.triton_runtime import device_of, launch
from transnormer.ops.linear_attention.triton_step import (
    Configuration,
    configuration,
    rows_of,
)


@triton.jit
def place_of(slot, known, start, length):
    """The length of a slot's ring and its oldest entry; -1 for a slot that the pool has not."""
    n = tl.load(length + slot, mask=known, other=-1)
    return n, tl.load(start + slot, mask=known, other=0)


@triton.jit(do_not_specialize=["num_slots", "q_row", "q_token", "q_head", "g_head"])
def ring_kernel(
    q, k, v, g, state, keys, values, start, length, slots, o, scale, num_slots,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, g_head,
    state_row, state_head, keys_row, keys_entry, keys_head, values_row, values_entry, values_head,
    STATE_K: tl.constexpr, STATE_V: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """Outputs and folds. One program: row b, kv head h, BLOCK_V columns; x_row: a stride of x."""
    SLICES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    F: tl.constexpr = C // 2
    program = tl.program_id(0)
    b = (program // (H * SLICES)).to(tl.int64)
    h = ((program // SLICES) % H).to(tl.int64)
    rows = tl.arange(0, BLOCK_K)
    columns = (program % SLICES) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = rows < K, columns < V
    o += (b * T * H + h) * G * V + columns
    slot = tl.load(slots + b).to(tl.int64) if HAS_SLOTS else b
    known = (slot >= 0) & (slot < num_slots)
    # All loads go out before anything waits for the length: the state's first, which are the most.
    source = state + slot * state_row + h * state_head
    source += rows[:, None] * STATE_K + columns[None, :] * STATE_V
    inside = (in_k[:, None] & in_v[None, :]) & known
    s = tl.load(source, mask=inside, other=0.0)
    n, first = place_of(slot, known, start, length)
    decay = tl.load(g + h * g_head).to(tl.float32) if HAS_DECAY else 0.0
    folds = n + T > C
    kept_n = tl.where(folds, n - F, n)
    kept_first = tl.where(folds, (first + F) % C, first)
    place = tl.arange(0, BLOCK_C)
    old = (place < C) & ((place - first + C) % C < n)
    # The order by age once the new tokens lie in the ring, which they enter where j >= kept_n.
    j = tl.where(place < C, (place - kept_first + C) % C, C)
    new = (j >= kept_n) & (j < kept_n + T)
    keys += slot * keys_row + h * keys_head + place.to(tl.int64)[:, None] * keys_entry
    xs = tl.load(keys + rows[None, :], mask=old[:, None] & in_k[None, :], other=0.0)
    values += slot * values_row + h * values_head + place.to(tl.int64)[:, None] * values_entry
    ys = tl.load(values + columns[None, :], mask=old[:, None] & in_v[None, :], other=0.0)
    k += b * k_row + h * k_head + (j - kept_n).to(tl.int64)[:, None] * k_token
    new_xs = tl.load(k + rows[None, :], mask=new[:, None] & in_k[None, :], other=0.0)
    v += b * v_row + h * v_head + (j - kept_n).to(tl.int64)[:, None] * v_token
    new_ys = tl.load(v + columns[None, :], mask=new[:, None] & in_v[None, :], other=0.0)
    q += b * q_row + h * G * q_head + rows
    query = tl.load(q, mask=in_k, other=0.0)
    if n < 0:
        # Skipped rows give 0; a slot outside the pool, or a ring rolled back too far, has to show.
        blank = tl.zeros([BLOCK_V], tl.float32) + tl.where(slot == -1, 0.0, float("nan"))
        for t in tl.static_range(T):
            for i in range(G):
                tl.store(o + (t * H * G + i) * V, blank.to(o.dtype.element_ty), mask=in_v)
        return
    xs, ys = xs.to(tl.float32), ys.to(tl.float32)
    if folds:
        if HAS_DECAY:
            kept, rest = split_decay(decay * F)
            s = s * rest + s * kept
        for f in range(F):
            entry = place == (first + f) % C
            x = tl.sum(tl.where(entry[:, None], xs, 0.0), 0)
            y = tl.sum(tl.where(entry[:, None], ys, 0.0), 0)
            if HAS_DECAY:
                y *= power(decay, F - 1 - f)
            s += x[:, None] * y[None, :]
        tl.store(source, s, mask=inside)
    xs = tl.where(new[:, None], new_xs.to(tl.float32), xs)
    ys = tl.where(new[:, None], new_ys.to(tl.float32), ys)
    for t in tl.static_range(T):
        weights = tl.full([BLOCK_C], 1.0, tl.float32) * scale
        whole = scale
        if HAS_DECAY:
            weights *= power(decay, kept_n + t - j)
            whole *= power(decay, kept_n + t + 1)
        weights = tl.where(j <= kept_n + t, weights, 0.0)
        for i in range(G):
            x = query.to(tl.float32)
            # The next query is on its way before this one's output is written.
            ahead = tl.where(i + 1 < G, (i + 1) * q_head, q_token)
            more = (i + 1 < G) | (t + 1 < T)
            query = tl.load(q + ahead, mask=in_k & more, other=0.0)
            scores = tl.sum(xs * x[None, :], 1) * weights
            out = tl.sum(x[:, None] * s, 0) * whole + tl.sum(scores[:, None] * ys, 0)
            tl.store(o + (t * H * G + i) * V, out.to(o.dtype.element_ty), mask=in_v)
        q += q_token


@triton.jit(do_not_specialize=["num_slots"])
def append_kernel(
    k, v, keys, values, start, length, slots, num_slots,
    k_row, k_token, k_head, v_row, v_token, v_head,
    keys_row, keys_entry, keys_head, values_row, values_entry, values_head,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """Put the new tokens of row b into its ring; move its start past what was folded."""
    b = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + b).to(tl.int64) if HAS_SLOTS else b
    n, first = place_of(slot, (slot >= 0) & (slot < num_slots), start, length)
    if n >= 0:
        if n + T > C:
            n -= C // 2
            first = (first + C // 2) % C
        rows = tl.arange(0, BLOCK_K)
        columns = tl.arange(0, BLOCK_V)
        for t in tl.static_range(T):
            entry = ((first + n + t) % C).to(tl.int64)
            for h in range(0, H, BLOCK_H):
                heads = h + tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
                inside = (heads < H) & (rows < K)[None, :]
                x = tl.load(k + b * k_row + heads * k_head + rows[None, :], mask=inside)
                target = keys + slot * keys_row + entry * keys_entry + heads * keys_head
                tl.store(target + rows[None, :], x, mask=inside)
                inside = (heads < H) & (columns < V)[None, :]
                y = tl.load(v + b * v_row + heads * v_head + columns[None, :], mask=inside)
                target = values + slot * values_row + entry * values_entry + heads * values_head
                tl.store(target + columns[None, :], y, mask=inside)
            k += k_token
            v += v_token
        # Every warp has read the old length before one of them replaces it.
        tl.debug_barrier()
        tl.store(start + slot, first)
        tl.store(length + slot, n + T)


def ring_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    ring: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    slots: Tensor | None,
    scale: float,
    cut: Configuration | None = None,
) -> Tensor:
    """Launch the ring step: returns o, [batch(, tokens), heads, value_dim]; updates the ring.

    Arguments are those of ``linear_attention_ring_step``, its checks already made; ring is (state,
    keys, values, start, length). cut overrides ``configuration``.
    """
    state, keys, values, start, length = ring
    *lead, heads, key_dim = q.shape
    kv_heads, value_dim = v.shape[-2:]
    batch, tokens, capacity = lead[0], 1 if len(lead) == 1 else lead[1], keys.shape[1]
    o = torch.empty((*lead, heads, value_dim), dtype=q.dtype, device=q.device)
    if batch == 0:
        return o
    columns, num_warps = cut or configuration(key_dim, value_dim, batch * kv_heads)
    q, q_strides = rows_of(q)
    k, k_strides = rows_of(k)
    v, v_strides = rows_of(v)
    state_row, state_head, state_k, state_v = state.stride()
    ring_strides = (*keys.stride()[:3], *values.stride()[:3])
    block_k, has_slots = block_of(key_dim, 1), slots is not None
    slots = start if slots is None else slots.contiguous()
    shape = {"T": tokens, "H": kv_heads, "K": key_dim, "V": value_dim, "C": capacity}
    with device_of(q):
        launch(
            ring_kernel, batch * kv_heads * -(-value_dim // columns),
            q, k, v, q if log_decay is None else log_decay, state, keys, values, start, length,
            slots, o, scale, state.shape[0], *q_strides, *k_strides, *v_strides,
            0 if log_decay is None else log_decay.stride(0), state_row, state_head, *ring_strides,
            STATE_K=state_k, STATE_V=state_v, G=heads // kv_heads, BLOCK_K=block_k,
            BLOCK_V=columns, BLOCK_C=block_of(capacity, 1), HAS_DECAY=log_decay is not None,
            HAS_SLOTS=has_slots, num_warps=num_warps, **shape,
        )  # fmt: skip
        block_v = block_of(value_dim, 1)
        launch(
            append_kernel, batch,
            k, v, keys, values, start, length, slots, state.shape[0], *k_strides, *v_strides,
            *ring_strides,
            BLOCK_H=min(block_of(kv_heads, 1), max(8192 // max(block_k, block_v), 1)),
            BLOCK_K=block_k, BLOCK_V=block_v, HAS_SLOTS=has_slots, num_warps=4, **shape,
        )  # fmt: skip
    return o
