"""A few rows times a matrix, with the norm, the gate, the sum or the product that belongs to it.

    y = act((a * u) W^T / rms(a)) * ((a * u) W_2^T / rms(a)) + residual,  each part where it is asked for

A few rows are bound by reading W, [N, K] with a contiguous last dim, once. A program owns BLOCK_N
rows of it and walks over K, the next tiles on their way while this one is multiplied: a single row
by multiply-adds, several by tensor cores, with W's rows as theirs. The norm is a number for a whole
row: the sum of squares is formed on the way, in every program, and divides the products at the end.
For a single row W may be int8 with a scale a row, which comes in at the end too, and there may be a
gate. Products and sums are float32.
"""

from typing import NamedTuple

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
def projection_kernel(
    x, gate, w, w2, scale, scale2, residual, y, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, GATE_ACTIVATION: tl.constexpr,
    DOUBLE: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
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
    factor = 1.0
    if NORM:
        factor = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
    # Rounded where the products of the model in PyTorch are.
    out = (out * factor).to(y.dtype.element_ty).to(tl.float32)
    if DOUBLE:
        up = (up * factor).to(y.dtype.element_ty).to(tl.float32)
        out = activated(out, ACTIVATION).to(y.dtype.element_ty).to(tl.float32) * up
    if ADD:
        out += tl.load(residual + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=rows < N)


@triton.jit
def rows_kernel(
    x, w, w2, residual, y, eps, M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, NORM: tl.constexpr, DOUBLE: tl.constexpr, ACTIVATION: tl.constexpr,
    ADD: tl.constexpr, DTYPE: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):
    """BLOCK_N columns of y, M <= BLOCK_M rows: products are [BLOCK_N, BLOCK_M]."""
    EVEN: tl.constexpr = (N % BLOCK_N == 0) and (K % BLOCK_K == 0)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns, m = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    let_next_begin(OVERLAP)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    sums2 = tl.zeros([BLOCK_N, BLOCK_M] if DOUBLE else [1, 1], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    wait_for_inputs(OVERLAP)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        first = load_weights(w, columns, rows, k, K, N, EVEN)
        at = x + m[None, :] * K + (k + columns)[:, None]
        inside = (m < M)[None, :] & ((k + columns) < K)[:, None]
        a = tl.load(at, mask=inside, other=0.0)
        if NORM:
            squares += tl.sum(a.to(tl.float32) * a.to(tl.float32), 0)
        sums = tl.dot(first.to(DTYPE), a.to(DTYPE), acc=sums)
        if DOUBLE:
            second = load_weights(w2, columns, rows, k, K, N, EVEN)
            sums2 = tl.dot(second.to(DTYPE), a.to(DTYPE), acc=sums2)
    factor = tl.zeros([BLOCK_M], tl.float32) + 1.0
    if NORM:
        factor = 1.0 / tl.sqrt(squares / K + eps)
    out = (sums * factor[None, :]).to(y.dtype.element_ty).to(tl.float32)
    if DOUBLE:
        up = (sums2 * factor[None, :]).to(y.dtype.element_ty).to(tl.float32)
        out = activated(out, ACTIVATION).to(y.dtype.element_ty).to(tl.float32) * up
    at = m[None, :] * N + rows[:, None]
    inside = (m < M)[None, :] & (rows < N)[:, None]
    if ADD:
        out += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


def tile_of(outputs: int, inputs: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps.

    About 8 KiB of bfloat16 a tile and two tiles on their way: with the four or five programs that
    share an SM of an H100 that is more than bandwidth times latency asks for. Fewer rows where the
    matrix is small, so that there are two programs an SM; each thread has 16 bytes at least.
    """
    columns = min(block_of(inputs), 1024)
    rows = max(4096 // columns, 1)
    while rows * columns > 1024 and outputs // rows < 264:
        rows //= 2
    return rows, columns, 4


def tile_of_rows(outputs: int, block: int, double: bool) -> tuple[int, int, int]:
    """Rows of W and columns of a program's tile of ``rows_kernel``, and its stages.

    Eight KiB of weights a stage. As many rows as leave a program for each SM of an H100, since x is
    read once for each program, from the L2 cache.
    """
    rows = 64
    while rows > 16 and outputs // rows < 128:
        rows //= 2
    columns = max(4096 // rows // (2 if double else 1), 64)
    return rows, columns, 5 if block <= 32 else 4


class Matrix(NamedTuple):
    """A weight [N, K], contiguous; of int8 with its scales, [N] or [N, 1]."""

    values: Tensor
    scales: Tensor | None = None


def project(
    x: Tensor,
    weight: Matrix,
    *,
    second: Matrix | None = None,
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
        second: one like ``weight``, whose product multiplies the activated first one.
        gate: [1, K] with a contiguous last dim; multiplies x.
        residual: [1, N]; the result is added to it, in its place.
        eps: of the norm x / sqrt(mean(x^2) + eps) before gate and products; None is no norm.
        activation: of the first product where there are two.
        gate_activation: of the gate.
        overlap: let the kernel begin before those ahead of it have ended.
    """
    outputs, inputs = weight.values.shape
    other = weight if second is None else second
    scaled = weight.scales is not None
    scales = [m.scales if m.scales is not None else x for m in (weight, other)]
    y = x.new_empty(1, outputs) if residual is None else residual
    rows, columns, warps = tile_of(outputs, inputs)
    run(
        projection_kernel, -(-outputs // rows), x, x, x if gate is None else gate, weight.values,
        other.values, *scales, y, y, 0.0 if eps is None else eps,
        N=outputs, K=inputs, BLOCK_N=rows, BLOCK_K=columns, SCALED=scaled, NORM=eps is not None,
        GATED=gate is not None, GATE_ACTIVATION=number_of(gate_activation),
        DOUBLE=second is not None, ACTIVATION=number_of(activation), ADD=residual is not None,
        overlap=overlap, num_warps=warps,
    )
    return y


def project_rows(
    x: Tensor,
    weight: Tensor,
    *,
    second: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    activation: str = "none",
    overlap: bool = False,
) -> Tensor:
    """``project`` of 2 to 64 rows in bfloat16 or float16, [M, N], without a gate.

    Args:
        x: [M, K], contiguous.
        weight, second: [N, K], contiguous.
        residual, eps, activation, overlap: as ``project``'s.
    """
    (count, inputs), outputs = x.shape, weight.shape[0]
    y = x.new_empty(count, outputs) if residual is None else residual
    block = block_of(count)
    rows, columns, stages = tile_of_rows(outputs, block, second is not None)
    run(
        rows_kernel, -(-outputs // rows), x, x, weight, weight if second is None else second, y, y,
        0.0 if eps is None else eps, count, N=outputs, K=inputs, BLOCK_M=block, BLOCK_N=rows,
        BLOCK_K=columns, NORM=eps is not None, DOUBLE=second is not None,
        ACTIVATION=number_of(activation), ADD=residual is not None,
        DTYPE=arithmetic(x.dtype)["DTYPE"], STAGES=stages, overlap=overlap, num_warps=4,
    )
    return y
