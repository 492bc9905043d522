"""A few rows times a matrix, with the norm, the gate, the sum or the product that belongs to it.

    y = act((a * u) W^T / rms(a)) * ((a * u) W_2^T / rms(a)) + residual,  each part where it is asked for

A few rows are bound by reading W, [N, K] with a contiguous last dim, once. A program owns BLOCK_N
rows of it and walks over K, the next tiles on their way while this one is multiplied: a single row
by multiply-adds, several by tensor cores, with W's rows as theirs. The norm is a number for a whole
row: the sum of squares is formed on the way, in every program, and divides the products at the end.
For a single row W may be int8 with a scale a row, which comes in at the end too, or of 4 bits
(``triton_nibbles``), and there may be a gate. Products and sums are float32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.decode.tiles import RowsTile, tile_of, tile_of_nibbles, tile_of_rows
from transnormer.ops.decode.triton_launch import (
    activated,
    finish_row,
    let_next_begin,
    number_of,
    run,
    wait_for_inputs,
)
from transnormer.ops.decode.triton_nibbles import Nibbles, nibbles_kernel
from transnormer.ops.linear_attention.launch_config import block_of
from transnormer.ops.linear_attention.triton_runtime import arithmetic

# Arguments stand in lines as they belong together.
# fmt: off


@triton.jit
def load_weights(w, columns, rows, k, K: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr):
    """The tile of W whose columns begin at k, 0 outside."""
    at = w + rows[:, None].to(tl.int64) * K + (k + columns)[None, :]
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=(rows < N)[:, None] & ((k + columns) < K)[None, :], other=0.0)


@triton.jit
def ask_for(
    w, rows, start, K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr
):
    """Have AHEAD columns of BLOCK_N rows brought into the L2 cache, without waiting for them.

    By sectors of 32 bytes, the least that a request may bring.
    """
    BYTES: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
    at = tl.minimum(start + tl.arange(0, AHEAD * BYTES // 32) * (32 // BYTES), K - 1)
    at = w + tl.minimum(rows, N - 1)[:, None].to(tl.int64) * K + at[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32,
        is_pure=False, pack=1,
    )


@triton.jit
def projection_kernel(
    x, gate, w, w2, scale, scale2, residual, y, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, GATE_ACTIVATION: tl.constexpr,
    DOUBLE: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_N entries of y: N outputs, K inputs; DOUBLE has a second matrix."""
    EVEN: tl.constexpr = (N % BLOCK_N == 0) and (K % BLOCK_K == 0)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    let_next_begin(OVERLAP)
    first = load_weights(w, columns, rows, 0, K, N, EVEN)
    second = first
    if DOUBLE:
        second = load_weights(w2, columns, rows, 0, K, N, EVEN)
    if OVERLAP and AHEAD > 0:
        ask_for(w, rows, 0, K, N, BLOCK_N, AHEAD)
        if DOUBLE:
            ask_for(w2, rows, 0, K, N, BLOCK_N, AHEAD)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    sums2 = tl.zeros([BLOCK_N, BLOCK_K] if DOUBLE else [1, 1], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    wait_for_inputs(OVERLAP)
    for k in tl.range(0, K, BLOCK_K):
        inside = (k + columns) < K
        a = tl.load(x + k + columns, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += a * a
        if GATED:
            u = tl.load(gate + k + columns, mask=inside, other=0.0).to(tl.float32)
            a *= activated(u, GATE_ACTIVATION).to(gate.dtype.element_ty).to(tl.float32)
        now, now2 = first, second
        if K > BLOCK_K:
            # Its tile of the next turn; beyond the last one it reads the last again.
            ahead = tl.minimum(k + BLOCK_K, (K - 1) // BLOCK_K * BLOCK_K)
            first = load_weights(w, columns, rows, ahead, K, N, EVEN)
            if DOUBLE:
                second = load_weights(w2, columns, rows, ahead, K, N, EVEN)
        sums += now.to(tl.float32) * a[None, :]
        if DOUBLE:
            sums2 += now2.to(tl.float32) * a[None, :]
    out = tl.sum(sums, 1)
    up = tl.sum(sums2, 1)
    if SCALED:
        out *= tl.load(scale + rows, mask=rows < N, other=0.0).to(tl.float32)
        if DOUBLE:
            up *= tl.load(scale2 + rows, mask=rows < N, other=0.0).to(tl.float32)
    square = tl.sum(squares, 0)
    finish_row(out, up, square, rows, residual, y, eps, N, K, NORM, DOUBLE, ACTIVATION, ADD)


@triton.jit
def rows_kernel(
    x, w, w2, residual, y, partial, arrived, eps, M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr, NORM: tl.constexpr,
    DOUBLE: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):
    """BLOCK_N columns of y, M <= BLOCK_M rows, over one of SPLIT parts of the inputs; the program
    of a block that ends last sums the parts in their order. Products are [BLOCK_N, BLOCK_M]."""
    EVEN: tl.constexpr = (N % BLOCK_N == 0) and (K % (SPLIT * BLOCK_K) == 0)
    PART: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K
    TILE: tl.constexpr = BLOCK_N * BLOCK_M
    SCRATCH: tl.constexpr = TILE * (2 if DOUBLE else 1) + BLOCK_M
    program = tl.program_id(0)
    block, start = program // SPLIT, (program % SPLIT) * PART
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns, m = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    let_next_begin(OVERLAP)
    if OVERLAP and AHEAD > 0:
        ask_for(w, rows, start, K, N, BLOCK_N, AHEAD)
        if DOUBLE:
            ask_for(w2, rows, start, K, N, BLOCK_N, AHEAD)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    sums2 = tl.zeros([BLOCK_N, BLOCK_M] if DOUBLE else [1, 1], tl.float32)
    squares = tl.zeros([BLOCK_K, BLOCK_M] if NORM else [1, 1], tl.float32)
    wait_for_inputs(OVERLAP)
    for step in tl.range(0, PART, BLOCK_K, num_stages=STAGES):
        k = start + step
        first = load_weights(w, columns, rows, k, K, N, EVEN)
        at = x + m[None, :] * K + (k + columns)[:, None]
        inside = (m < M)[None, :] if EVEN else (m < M)[None, :] & ((k + columns) < K)[:, None]
        a = tl.load(at, mask=inside, other=0.0)
        if NORM:
            # Summed over the tile's columns once, at the end: a sum here is a barrier a turn.
            squares += a.to(tl.float32) * a.to(tl.float32)
        sums = tl.dot(first.to(DTYPE), a.to(DTYPE), acc=sums)
        if DOUBLE:
            second = load_weights(w2, columns, rows, k, K, N, EVEN)
            sums2 = tl.dot(second.to(DTYPE), a.to(DTYPE), acc=sums2)
    total = tl.sum(squares, 0)
    last = 0
    if SPLIT > 1:
        own = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        mine = partial + program.to(tl.int64) * SCRATCH
        tl.store(mine + own, sums)
        if DOUBLE:
            tl.store(mine + TILE + own, sums2)
        if NORM:
            tl.store(mine + (SCRATCH - BLOCK_M) + m, total)
        # All warps have stored before one of them says so.
        tl.debug_barrier()
        last = tl.atomic_add(arrived + block, 1, sem="acq_rel") - (SPLIT - 1)
        if last != 0:
            return
        tl.store(arrived + block, 0)
        mine = partial + (block * SPLIT).to(tl.int64) * SCRATCH
        sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        sums2 = tl.zeros([BLOCK_N, BLOCK_M] if DOUBLE else [1, 1], tl.float32)
        total = tl.zeros([BLOCK_M] if NORM else [1], tl.float32)
        for part in tl.static_range(SPLIT):
            there = mine + part * SCRATCH
            sums += tl.load(there + own, cache_modifier=".cg")
            if DOUBLE:
                sums2 += tl.load(there + TILE + own, cache_modifier=".cg")
            if NORM:
                total += tl.load(there + (SCRATCH - BLOCK_M) + m, cache_modifier=".cg")
    factor = tl.zeros([BLOCK_M], tl.float32) + 1.0
    if NORM:
        factor = 1.0 / tl.sqrt(total / K + eps)
    out = (sums * factor[None, :]).to(y.dtype.element_ty).to(tl.float32)
    if DOUBLE:
        up = (sums2 * factor[None, :]).to(y.dtype.element_ty).to(tl.float32)
        out = activated(out, ACTIVATION).to(y.dtype.element_ty).to(tl.float32) * up
    at = m[None, :] * N + rows[:, None]
    inside = (m < M)[None, :] & (rows < N)[:, None]
    if ADD:
        out += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


class Matrix(NamedTuple):
    """A weight [N, K], contiguous; of int8 with its scales, [N] or [N, 1]."""

    values: Tensor
    scales: Tensor | None = None


def project(
    x: Tensor,
    weight: Matrix | Nibbles,
    *,
    second: Matrix | Nibbles | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    activation: str = "none",
    gate_activation: str = "none",
    overlap: bool = False,
) -> Tensor:
    """The projection of one row, [1, N].

    Args:
        x: [1, K], contiguous.
        weight: of N outputs.
        second: one of the same kind, whose product multiplies the activated first one.
        gate: [1, K] with a contiguous last dim; multiplies x.
        residual: [1, N]; the result is added to it, in its place.
        eps: of the norm x / sqrt(mean(x^2) + eps) before gate and products; None is no norm.
        activation: of the first product where there are two.
        gate_activation: of the gate.
        overlap: let the kernel begin before those ahead of it have ended.
    """
    other, double, inputs = weight if second is None else second, second is not None, x.shape[1]
    own: dict[str, Any]
    if isinstance(weight, Nibbles) and isinstance(other, Nibbles):
        outputs, group = len(weight.words), weight.group
        tile, kernel = tile_of_nibbles(outputs, inputs, double), nibbles_kernel
        weights = (weight.words, other.words, weight.pairs, other.pairs)
        own = {"GROUP": group, "BLOCK_G": max(tile.columns * 8 // group, 1)}
    else:
        assert isinstance(weight, Matrix)
        assert isinstance(other, Matrix)
        outputs, size = len(weight.values), weight.values.element_size()
        tile, kernel = tile_of(outputs, inputs, size, double), projection_kernel
        scales = (m.scales if m.scales is not None else x for m in (weight, other))
        weights = (weight.values, other.values, *scales)
        own = {"BLOCK_K": tile.columns, "SCALED": weight.scales is not None, "AHEAD": tile.ahead}
    y = x.new_empty(1, outputs) if residual is None else residual
    run(
        kernel, -(-outputs // tile.rows), x, x, x if gate is None else gate, *weights, y, y,
        0.0 if eps is None else eps, N=outputs, K=inputs, BLOCK_N=tile.rows, NORM=eps is not None,
        GATED=gate is not None, GATE_ACTIVATION=number_of(gate_activation), DOUBLE=double,
        ACTIVATION=number_of(activation), ADD=residual is not None, overlap=overlap,
        num_warps=tile.warps, **own,
    )
    return y


def project_rows(
    x: Tensor,
    weight: Tensor,
    *,
    arrived: Tensor,
    second: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    activation: str = "none",
    overlap: bool = False,
    tile: RowsTile | None = None,
) -> Tensor:
    """``project`` of 2 to 64 rows in bfloat16 or float16, [M, N], without a gate.

    Sums are float32 and in a fixed order, whichever program ends last.

    Args:
        x: [M, K], contiguous.
        weight, second: [N, K], contiguous.
        arrived: int32 zeros, one for each 16 outputs; zeros again afterwards. Launches that follow
            each other may share them.
        residual, eps, activation, overlap: as ``project``'s.
        tile: overrides ``tile_of_rows``.
    """
    (count, inputs), outputs = x.shape, weight.shape[0]
    y = x.new_empty(count, outputs) if residual is None else residual
    block, double = block_of(count), second is not None
    tile = tile or tile_of_rows(outputs, inputs, block, double)
    programs = -(-outputs // tile.rows) * tile.split
    size = programs * (tile.rows * block * (2 if double else 1) + block)
    partial = x.new_empty(size if tile.split > 1 else 0, dtype=torch.float32)
    run(
        rows_kernel, programs, x, x, weight, weight if second is None else second, y, y, partial,
        arrived, 0.0 if eps is None else eps, count, N=outputs, K=inputs, BLOCK_M=block,
        BLOCK_N=tile.rows, BLOCK_K=tile.columns, SPLIT=tile.split, AHEAD=tile.ahead,
        NORM=eps is not None, DOUBLE=double, ACTIVATION=number_of(activation),
        ADD=residual is not None, DTYPE=arithmetic(x.dtype)["DTYPE"], STAGES=tile.stages,
        overlap=overlap, num_warps=tile.warps,
    )
    return y
