"""The forget gate with a lower bound in one pass over memory each way, in Triton.

    f = b + (1 - b) s,  s = 1 / (1 + exp(-z));    log f;    1 - f = (1 - b) (1 - s)

    dz = (1 - b) (1 - s) (dlog s / f - dtaken s);    db = sum over tokens of (1 - s) (dlog / f - dtaken)

z is [R, C] with any row stride, such as a slice of a projection; all else is contiguous. Everything
is written with E = exp(-|z|) <= 1: s and 1 - s are 1 / (1 + E) and E / (1 + E) in one order or the
other, and s / f and (1 - s) / f are quotients whose divisor does not vanish, so that nothing
overflows. Source: Qin et al. 2024, arXiv:2404.07904, section 3 (HGRN2).

Legend: R rows (tokens), C channels, W a block of channels, N rows a step, M steps a program.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.linear_attention.launch_config import block_of
from transnormer.ops.linear_attention.triton_runtime import device_of, launch
from transnormer.ops.triton_math import exp_precise, log_quotient

# Stands for log 0 where -inf minus -inf would be NaN; exp of it is 0.
_NOTHING: tl.constexpr = tl.constexpr(-1e30)
# What s is at least in a divisor; below it b, where there is one, decides.
_LEAST: tl.constexpr = tl.constexpr(1e-30)

# Tokens a program: at width 1,024 and 32,768 tokens 64 make 2,048 programs, and the partial sums of
# the bound's gradient are 1 / 128 of what the kernel reads.
_TOKENS = 64


class Blocks(NamedTuple):
    """How [rows, channels] is cut into programs."""

    width: int
    rows: int  # of a step
    steps: int  # of a program
    count: int  # of programs along the rows
    columns: int  # of programs along the channels


def blocks_of(rows: int, channels: int) -> Blocks:
    """Steps of 512 numbers, 4 a thread: of more, the two stores want different layouts, and Triton
    computes everything once for each."""
    width = min(block_of(channels, 8), 256)
    step = max(512 // width, 1)
    steps = max(_TOKENS // step, 1)
    return Blocks(width, step, steps, max(-(-rows // (step * steps)), 1), -(-channels // width))


@triton.jit
def load_tile(x, at, stride, channels, live):
    """Tile [N, W] of x [R, C] in float32; 0 outside."""
    where = at.to(tl.int64)[:, None] * stride + channels[None, :]
    return tl.load(x + where, mask=live, other=0.0).to(tl.float32)


@triton.jit
def load_z(z, at, stride, channels, live):
    """The same of z, with -inf as a number that has no difference from itself; NaN stays."""
    value = load_tile(z, at, stride, channels, live)
    return tl.where(value < _NOTHING, _NOTHING, value)


@triton.jit
def load_bound(bound, channels, C, BOUNDED: tl.constexpr):
    """The bounds of the channels, [1, W]."""
    if BOUNDED:
        return tl.load(bound + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    return tl.zeros_like(channels).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["R"])
def forget_gate_kernel(
    z, bound, log_gate, taken, R, C, z_row,
    W: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """M tiles of log f and 1 - f below each other."""
    columns = (C + W - 1) // W
    program = tl.program_id(0)
    channels = program % columns * W + tl.arange(0, W)
    b = load_bound(bound, channels, C, BOUNDED)
    log_b = tl.where(b > 0.0, tl.log(tl.where(b > 0.0, b, 1.0)), -float("inf"))
    for step in tl.range(0, M, num_stages=4):
        at = (program // columns * M + step) * N + tl.arange(0, N)
        live = (at < R)[:, None] & (channels < C)[None, :]
        x = load_z(z, at, z_row, channels, live)
        small = exp_precise(-tl.abs(x))
        gone = (1.0 - b) * tl.where(x < 0.0, 1.0, small) / (1.0 + small)
        # log f = log1p(-gone), or where f < 1/2, which is left of z = 0,
        # log(b + (1 - b) s) = log((b + E) / (1 + E)) = most + log((1 + least) / (1 + E)).
        most, least = x, 0.0
        if BOUNDED:
            most, least = tl.maximum(log_b, x), tl.exp(-tl.abs(log_b - x))
        near = gone < 0.5
        log_f = log_quotient(
            tl.where(near, -gone, least - small), tl.where(near, 1.0, 1.0 + small)
        ) + tl.where(near, 0.0, most)
        to = at.to(tl.int64)[:, None] * C + channels[None, :]
        tl.store(log_gate + to, log_f, mask=live)
        tl.store(taken + to, gone.to(taken.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["R"])
def forget_gate_gradient_kernel(
    d_log, d_taken, z, bound, dz, d_bound, R, C, z_row,
    W: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BOUNDED: tl.constexpr,
    WITH_BOUND: tl.constexpr,
):  # fmt: skip
    """M tiles of dz below each other, and a row [W] of the sum of db over their tokens."""
    columns = (C + W - 1) // W
    program = tl.program_id(0)
    channels = program % columns * W + tl.arange(0, W)
    b = load_bound(bound, channels, C, BOUNDED)
    total = tl.zeros([N, W], tl.float32)
    for step in tl.range(0, M, num_stages=4):
        at = (program // columns * M + step) * N + tl.arange(0, N)
        live = (at < R)[:, None] & (channels < C)[None, :]
        x = load_z(z, at, z_row, channels, live)
        grad_log = load_tile(d_log, at, C, channels, live)
        grad_taken = load_tile(d_taken, at, C, channels, live)
        small = exp_precise(-tl.abs(x))
        left = x < 0.0
        kept = 1.0 / (1.0 + small)
        # s / f and (1 - s) / f; E stands for 1 / E where z < 0.
        share = 1.0 / tl.where(left, tl.maximum(small, _LEAST) + b, 1.0 + b * small)
        ratio = tl.where(left, tl.maximum(small, _LEAST), 1.0) * share
        other = tl.where(left, 1.0, small)
        dx = (1.0 - b) * other * kept
        dx *= grad_log * ratio - grad_taken * tl.where(left, small, 1.0) * kept
        to = at.to(tl.int64)[:, None] * C + channels[None, :]
        tl.store(dz + to, dx.to(dz.dtype.element_ty), mask=live)
        if WITH_BOUND:
            total += other * (grad_log * share - grad_taken * kept)
    if WITH_BOUND:
        to = (program // columns).to(tl.int64) * C + channels
        tl.store(d_bound + to, tl.sum(total, 0), mask=channels < C)


def as_rows(x: Tensor) -> Tensor:
    """[..., channels] as [rows, channels] whose channels lie side by side; a view where it can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def forward(z: Tensor, bound: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """log f in float32 and 1 - f in ``dtype``, shaped as z."""
    log_gate = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    taken = torch.empty(z.shape, dtype=dtype, device=z.device)
    if z.numel() == 0:
        return log_gate, taken
    rows, bound = as_rows(z), None if bound is None else bound.contiguous()
    cut = blocks_of(*rows.shape)
    with device_of(z):
        launch(
            forget_gate_kernel, cut.count * cut.columns, rows, bound, log_gate, taken, *rows.shape,
            rows.stride(0), W=cut.width, N=cut.rows, M=cut.steps, BOUNDED=bound is not None,
            num_warps=4,
        )  # fmt: skip
    return log_gate, taken


def backward(
    d_log: Tensor, d_taken: Tensor, z: Tensor, bound: Tensor | None, with_bound: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of z, in its dtype, and of the bound, float32 (empty where not asked for)."""
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    rows, bound = as_rows(z), None if bound is None else bound.contiguous()
    cut = blocks_of(*rows.shape)
    shape = (cut.count, rows.shape[1]) if with_bound else (0,)
    parts = torch.empty(shape, dtype=torch.float32, device=z.device)
    if z.numel():
        with device_of(z):
            launch(
                forget_gate_gradient_kernel, cut.count * cut.columns, d_log.contiguous(),
                d_taken.contiguous(), rows, bound, dz, parts, *rows.shape, rows.stride(0),
                W=cut.width, N=cut.rows, M=cut.steps, BOUNDED=bound is not None,
                WITH_BOUND=with_bound, num_warps=4,
            )  # fmt: skip
    elif with_bound:
        parts.zero_()
    return dz, parts.sum(0) if with_bound else parts
