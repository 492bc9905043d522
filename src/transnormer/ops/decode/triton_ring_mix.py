"""A token of each row against rings: activations, LRPE, state, output, fold and append in one kernel.

The formulas are those of ``ops.linear_attention.triton_ring``. A program owns a whole head of a row,
so it alone reads and writes this head's entries of the ring, and nothing that it loads depends on
how many of them are used: the state, the keys and the values are all on their way before the
kernels before it have ended. What all heads of a row share, where its ring begins and how long it
is, is moved on by the kernel after it (``triton_pointwise.norm_gate``).

Keys and values that no token has filled may hold anything; they are replaced by zeros. Sums are
float32. Source: Qin et al. 2024, arXiv:2401.04658 (the recurrent form, unrolled over the ring).
"""

import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.decode.triton_launch import (
    activated,
    let_next_begin,
    number_of,
    run,
    wait_for_inputs,
)
from transnormer.ops.decode.triton_pointwise import rounded
from transnormer.ops.linear_attention.launch_config import block_of
from transnormer.ops.linear_attention.ring import RingState
from transnormer.ops.linear_attention.triton_arithmetic import power, split_decay
from transnormer.ops.linear_attention.triton_ring import place_of
from transnormer.ops.lrpe.triton_lrpe import turn

# Entries of a state that a thread holds, the most warps of a program, and registers of a thread:
# two programs of 8 warps share an SM.
_ENTRIES, _WARPS, _REGISTERS = 64, 16, 128
# Arguments stand in lines as they belong together.
# fmt: off


@triton.jit(do_not_specialize=["num_slots"])
def ring_mix_kernel(
    qkvu, where, theta, log_decay, state, keys, values, start, length, slots, o, num_slots,
    row_stride,
    H: tl.constexpr, HEAD_DIM: tl.constexpr, KEY_DIM: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr, V_ACTIVATION: tl.constexpr, LRPE: tl.constexpr,
    DECAY: tl.constexpr, OVERLAP: tl.constexpr,
):
    """A row and a head."""
    EVEN: tl.constexpr = (KEY_DIM == BLOCK_K) and (HEAD_DIM == BLOCK_V)
    F: tl.constexpr = C // 2
    let_next_begin(OVERLAP)
    program = tl.program_id(0)
    b, h = (program // H).to(tl.int64), (program % H).to(tl.int64)
    channels, columns, place = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_C)
    in_k, in_v = channels < KEY_DIM, columns < HEAD_DIM
    slot = tl.load(slots + b).to(tl.int64)
    known = (slot >= 0) & (slot < num_slots)
    used = tl.where(known, slot, 0)
    target = state + (used * H + h) * KEY_DIM * HEAD_DIM
    target += channels[:, None] * HEAD_DIM + columns[None, :]
    inside = in_k[:, None] & in_v[None, :]
    # Of a row that is not real too, to no effect: whole tiles are read in 16-byte loads.
    s = tl.load(target) if EVEN else tl.load(target, mask=inside, other=0.0)
    keys += (used * C * H + h) * KEY_DIM
    values += (used * C * H + h) * HEAD_DIM
    in_c = place < C
    xs = tl.load(keys + place[:, None] * (H * KEY_DIM) + channels[None, :],
                 mask=in_c[:, None] & in_k[None, :], other=0.0)
    ys = tl.load(values + place[:, None] * (H * HEAD_DIM) + columns[None, :],
                 mask=in_c[:, None] & in_v[None, :], other=0.0)
    n, first = place_of(slot, known, start, length)
    live = n >= 0
    g = tl.load(log_decay + h) if DECAY else 0.0
    wait_for_inputs(OVERLAP)
    position = tl.load(where + b)
    source = qkvu + b * row_stride + h * HEAD_DIM
    # Both in one tile: of tensors smaller than a program every warp would form all entries.
    own, pair = channels % HEAD_DIM, tl.arange(0, 2)[None, :] * (H * HEAD_DIM)
    qk = tl.load(source + own[:, None] + pair, mask=in_k[:, None], other=0.0).to(tl.float32)
    qk = tl.where(in_k[:, None], rounded(activated(qk, ACTIVATION), qkvu), 0.0)
    if LRPE:
        frequencies = tl.load(theta + h * HEAD_DIM + own, mask=in_k, other=0.0)
        cos, sin = turn(position + tl.zeros([1], tl.int64), frequencies)
        factor = tl.sum(tl.where((channels >= HEAD_DIM)[None, :], sin, cos), 0)
        qk = rounded(qk * factor[:, None], qkvu)
    q, k = tl.split(qk)
    v = tl.load(source + 2 * H * HEAD_DIM + columns, mask=in_v, other=0.0).to(tl.float32)
    v = rounded(activated(v, V_ACTIVATION), qkvu)
    folds = n + 1 > C
    if folds:
        if DECAY:
            kept, rest = split_decay(g * F)
            s = s * rest + s * kept
        for f in range(F):
            entry = ((first + f) % C).to(tl.int64)
            x = tl.load(keys + entry * (H * KEY_DIM) + channels, mask=in_k, other=0.0).to(tl.float32)
            y = tl.load(values + entry * (H * HEAD_DIM) + columns, mask=in_v, other=0.0)
            y = y.to(tl.float32)
            if DECAY:
                y *= power(g, F - 1 - f)
            s += x[:, None] * y[None, :]
        tl.store(target, s, mask=inside)
    n = tl.where(folds, n - F, n)
    first = tl.where(folds, (first + F) % C, first)
    # Entries by age: those of past tokens are the first n.
    j = tl.where(in_c, (place - first + C) % C, C)
    held = (j < n)[:, None]
    whole, weights, tail = 1.0, tl.full([BLOCK_C], 1.0, tl.float32), tl.sum(q * k, 0)
    if DECAY:
        whole, weights = power(g, n + 1), power(g, n - j)
    scores = tl.sum(tl.where(held, xs.to(tl.float32), 0.0) * q[None, :], 1) * weights
    out = tl.sum(scores[:, None] * tl.where(held, ys.to(tl.float32), 0.0), 0)
    out += tl.sum(q[:, None] * s, 0) * whole + tail * v
    # Skipped rows give 0; a slot outside the pool, or a ring rolled back too far, has to show.
    out = tl.where(live, out, tl.where(slot == -1, 0.0, float("nan")))
    tl.store(o + (b * H + h) * HEAD_DIM + columns, out.to(o.dtype.element_ty), mask=in_v)
    # A fold has read the entry that the new token takes.
    tl.debug_barrier()
    entry = ((first + n) % C).to(tl.int64)
    tl.store(keys + entry * (H * KEY_DIM) + channels, k.to(keys.dtype.element_ty), mask=in_k & live)
    tl.store(values + entry * (H * HEAD_DIM) + columns, v.to(values.dtype.element_ty), mask=in_v & live)


def fits(ring: RingState) -> bool:
    """Whether a program can hold a head of a ring's state, and the ring lies as kernels walk it."""
    key_dim, head_dim = ring.state.shape[2:]
    small = block_of(key_dim) * block_of(head_dim) <= 32 * _WARPS * _ENTRIES
    return small and all(x.is_contiguous() for x in ring)


def ring_mix(
    qkvu: Tensor,
    where: Tensor,
    theta: Tensor | None,
    log_decay: Tensor | None,
    ring: RingState,
    slots: Tensor,
    heads: int,
    activation: str,
    v_activation: str,
    *,
    overlap: bool,
) -> Tensor:
    """``triton_pointwise.mix`` against rings that ``fits``; their start and length stay as they are.

    Args:
        qkvu, where, theta, log_decay, heads, activation, v_activation, overlap: as ``mix``'s.
        ring: a pool of rings; state, keys and values are advanced in place.
        slots: int32 [rows]; -1 skips a row, whose output is 0.

    Returns:
        o, [rows, heads * head_dim]; NaN for a slot outside the pool or a ring rolled back too far.
    """
    rows, (key_dim, head_dim) = qkvu.shape[0], ring.state.shape[2:]
    o = qkvu.new_empty(rows, heads * head_dim)
    block_k, block_v = block_of(key_dim), block_of(head_dim)
    run(
        ring_mix_kernel, rows * heads, o, qkvu, where, where if theta is None else theta,
        where if log_decay is None else log_decay, *ring, slots, o, ring.state.shape[0],
        qkvu.stride(0), H=heads, HEAD_DIM=head_dim, KEY_DIM=key_dim, C=ring.capacity,
        BLOCK_K=block_k, BLOCK_V=block_v, BLOCK_C=block_of(ring.capacity),
        ACTIVATION=number_of(activation), V_ACTIVATION=number_of(v_activation),
        LRPE=theta is not None, DECAY=log_decay is not None, overlap=overlap,
        num_warps=max(block_k * block_v // (32 * _ENTRIES), 1), maxnreg=_REGISTERS,
    )
    return o
