"""Elementary functions inside kernels, in float32 with small relative errors over their whole range.

Triton's exp multiplies by log2(e) first, which is off by 6e-8 times the argument; there is no log1p
and no expm1 that the interpreter runs too. All are a dozen instructions without branches.
"""

import triton
import triton.language as tl

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# log 2 in two parts; products of the first, which has 9 bits, with integers up to 2^15 are exact.
_LOG_2: tl.constexpr = tl.constexpr(0.693359375)
_LOG_2_REST: tl.constexpr = tl.constexpr(-2.12194440e-4)


@triton.jit
def exp_precise(x):
    """exp(x), x <= 0, finite or -inf; relative error 3e-7 where the result is at least 1e-38."""
    # exp is 0 from here on, and infinity has no whole part.
    x = tl.where(x < -200.0, -200.0, x)
    whole = tl.floor(x * _LOG2_E + 0.5)
    part = (x - whole * _LOG_2) - whole * _LOG_2_REST
    return tl.exp2(whole) * tl.exp2(part * _LOG2_E)


@triton.jit
def log_quotient(x, y):
    """log(1 + x / y) for -1/2 <= x / y <= 1, y > 0: accurate where the quotient is near 0.

    2 artanh(w) with w = x / (2 y + x), |w| <= 1/3, as its series: the first term left out is
    2 w^17 / 17 = 9e-10.
    """
    w = x / (2.0 * y + x)
    square = w * w
    series = square * (2.0 / 15.0) + 2.0 / 13.0
    for n in tl.static_range(5):
        series = tl.fma(series, square, 2.0 / (11.0 - 2.0 * n))
    return tl.fma(series * square, w, 2.0 * w)


@triton.jit
def decay_and_rest(g):
    """exp(g) and 1 - exp(g), g <= 0, both accurate: near 0 the second one is a polynomial.

    The first term that the polynomial leaves out is 0.5^9 / 10! = 5e-10 of the result.
    """
    decay = exp_precise(g)
    y = tl.where(g > -0.5, g, 0.0)
    series = tl.fma(y, 1.0 / 362_880.0, 1.0 / 40_320.0)
    series = tl.fma(series, y, 1.0 / 5_040.0)
    series = tl.fma(series, y, 1.0 / 720.0)
    series = tl.fma(series, y, 1.0 / 120.0)
    series = tl.fma(series, y, 1.0 / 24.0)
    series = tl.fma(series, y, 1.0 / 6.0)
    series = tl.fma(series, y, 0.5)
    series = tl.fma(series, y, 1.0)
    return decay, tl.where(g > -0.5, -y * series, 1.0 - decay)
