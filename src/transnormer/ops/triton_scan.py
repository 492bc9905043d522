"""The first-order recurrence of complex vectors in three launches whatever the length, in Triton.

    h_t = a_t h_{t-1} + x_t, from h_{-1} = 0
    adjoint: g_t = dh_t + conj(a_{t+1}) g_{t+1};    dx_t = g_t;    da_t = g_t conj(h_{t-1})

Rows are cut into units (``scan_units``): the product of the factors and the sum of every unit; a scan
over units; results of every unit from what enters it. The adjoint walks from the last token with
the factor of the token behind, 0 behind the last one. Only sums and products of what is given
occur, so that a = 0 is like any other factor and nothing overflows while |a| <= 1. A row of one unit
takes the last launch alone.

a, x, h [B, T, C, 2] contiguous, float32, the last dim real and imaginary part. Legend: T tokens a
row, L tokens a unit, C channels, W a block of them; a complex number is a pair (re, im).
Source: Martin and Cundy 2018, arXiv:1709.04057 (linear recurrences in segments).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.gates.triton_cumulative_softmax import place_of_program
from transnormer.ops.linear_attention.triton_runtime import device_of, launch
from transnormer.ops.linear_attention.triton_units import find_unit
from transnormer.ops.scan_units import Units, units_of


@triton.jit
def multiply_add(a_re, a_im, h_re, h_im, x_re, x_im):
    """a h + x."""
    return a_re * h_re - a_im * h_im + x_re, a_re * h_im + a_im * h_re + x_im


@triton.jit
def load_pair(x, at, live):
    """Complex numbers whose real parts lie at ``at``; both parts in one load."""
    both = tl.arange(0, 2)[None, :]
    return tl.split(tl.load(x + at[:, None] + both, mask=live[:, None], other=0.0))


@triton.jit
def store_pair(x, at, re, im, live):
    """The reverse of load_pair."""
    both = tl.arange(0, 2)[None, :]
    tl.store(x + at[:, None] + both, tl.join(re, im), mask=live[:, None])


@triton.jit
def load_factor(a, at, t, length, step, left, live, ADJOINT: tl.constexpr):
    """The factor of the t-th token of a unit; ``left`` tokens of the row come behind the unit."""
    if ADJOINT:
        exists = (t > 0) | (left > 0)
        re, im = load_pair(a, at + step, live & exists)
        return re, -im
    return load_pair(a, at, live)


@triton.jit
def begin_of(unit, T, L, SEGMENTS, C, channels, ADJOINT: tl.constexpr):
    """(place of the first number in the order of the walk, step to the next token, length, tokens of
    the row behind the unit)."""
    sequence, row, start, length, first, last = find_unit(unit, unit, T, L, SEGMENTS, False)
    step = tl.cast(C, tl.int64) * 2
    token = row * T + start
    if ADJOINT:
        token += length - 1
    return token * step + channels * 2, step, length.to(tl.int32), T - start - length


@triton.jit(do_not_specialize=["T", "L", "SEGMENTS"])
def scan_sums_kernel(
    a, x, factors, sums, T, L, SEGMENTS, C,
    W: tl.constexpr, ADJOINT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Product of the factors and local sum of every unit, [units, C, 2] each."""
    unit, channels, at_unit = place_of_program(C, W)
    live = channels < C
    begin, step, length, left = begin_of(unit, T, L, SEGMENTS, C, channels, ADJOINT)
    zero = tl.zeros([W], tl.float32)
    h_re, h_im, p_re, p_im = zero, zero, zero + 1.0, zero
    for t in tl.range(0, length, num_stages=STAGES):
        at = begin - t * step if ADJOINT else begin + t * step
        a_re, a_im = load_factor(a, at, t, length, step, left, live, ADJOINT)
        x_re, x_im = load_pair(x, at, live)
        h_re, h_im = multiply_add(a_re, a_im, h_re, h_im, x_re, x_im)
        p_re, p_im = multiply_add(a_re, a_im, p_re, p_im, 0.0, 0.0)
    store_pair(factors, at_unit * 2, p_re, p_im, live)
    store_pair(sums, at_unit * 2, h_re, h_im, live)


@triton.jit(do_not_specialize=["SEGMENTS"])
def scan_units_kernel(
    factors, sums, SEGMENTS, C, W: tl.constexpr, ADJOINT: tl.constexpr, STAGES: tl.constexpr
):
    """In place of each unit's sum what enters it."""
    row, channels, at_row = place_of_program(C, W)
    live = channels < C
    h_re, h_im = tl.zeros([W], tl.float32), tl.zeros([W], tl.float32)
    begin = row.to(tl.int64) * SEGMENTS
    for i in tl.range(0, SEGMENTS, num_stages=STAGES):
        unit = begin + (SEGMENTS - 1 - i if ADJOINT else i)
        at = (unit * C + channels) * 2
        p_re, p_im = load_pair(factors, at, live)
        x_re, x_im = load_pair(sums, at, live)
        store_pair(sums, at, h_re, h_im, live)
        h_re, h_im = multiply_add(p_re, p_im, h_re, h_im, x_re, x_im)


@triton.jit(do_not_specialize=["T", "L", "SEGMENTS"])
def scan_kernel(
    a, x, entering, made, h, da, T, L, SEGMENTS, C,
    W: tl.constexpr, ADJOINT: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h of a unit, or g from x = dh and, from h, da; WHOLE: nothing enters it."""
    unit, channels, at_unit = place_of_program(C, W)
    live = channels < C
    begin, step, length, left = begin_of(unit, T, L, SEGMENTS, C, channels, ADJOINT)
    if WHOLE:
        h_re, h_im = tl.zeros([W], tl.float32), tl.zeros([W], tl.float32)
    else:
        h_re, h_im = load_pair(entering, at_unit * 2, live)
    for t in tl.range(0, length, num_stages=STAGES):
        at = begin - t * step if ADJOINT else begin + t * step
        a_re, a_im = load_factor(a, at, t, length, step, left, live, ADJOINT)
        x_re, x_im = load_pair(x, at, live)
        h_re, h_im = multiply_add(a_re, a_im, h_re, h_im, x_re, x_im)
        store_pair(made, at, h_re, h_im, live)
        if ADJOINT:
            # The first token of a row has no state before it.
            exists = (t + 1 < length) | (T - left - length > 0)
            b_re, b_im = load_pair(h, at - step, live & exists)
            d_re, d_im = multiply_add(b_re, -b_im, h_re, h_im, 0.0, 0.0)
            store_pair(da, at, d_re, d_im, live)


def run(a: Tensor, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """h of contiguous float32 a and x [batch, seq, channels, 2]; or, with x the gradient of a given
    h, those of x and a."""
    made, adjoint = torch.empty_like(x), h is not None
    da = torch.empty_like(a) if adjoint else None
    batch, seq, channels, _ = x.shape
    if x.numel() == 0:
        return made, da
    units: Units = units_of(batch, seq, channels, None)
    cut = (seq, units.length, units.segments, channels)
    constants = {"W": units.width, "ADJOINT": adjoint, "STAGES": 3, "num_warps": units.warps}
    sums = None
    with device_of(x):
        if not units.whole:
            factors, sums = (x.new_empty(units.count, channels, 2) for _ in range(2))
            programs = units.count * units.blocks
            launch(scan_sums_kernel, programs, a, x, factors, sums, *cut, **constants)
            launch(
                scan_units_kernel, batch * -(-channels // 32), factors, sums, units.segments, channels,
                W=32, ADJOINT=adjoint, STAGES=6, num_warps=1,
            )  # fmt: skip
        launch(
            scan_kernel, units.count * units.blocks, a, x, sums, made, h, da, *cut,
            WHOLE=units.whole, **constants,
        )  # fmt: skip
    return made, da


def forward(a: Tensor, x: Tensor) -> Tensor:
    """h."""
    return run(a.contiguous(), x.contiguous(), None)[0]


def backward(grad: Tensor, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a and x."""
    dx, da = run(a.contiguous(), grad.contiguous(), h)
    assert da is not None
    return da, dx
