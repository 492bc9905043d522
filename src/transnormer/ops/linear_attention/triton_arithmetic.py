"""Decays, operands of matrix products and tiles, as the kernels of linear attention form them."""

import triton
import triton.language as tl

# Arguments stand in lines as they belong together.
# fmt: off


@triton.jit
def power(g, exponent):
    """exp(g * exponent), 1 for exponent 0 whatever g is (g may be -inf), 0 for a negative one."""
    some = tl.exp(g * tl.maximum(exponent, 1).to(tl.float32))
    return tl.where(exponent > 0, some, tl.where(exponent == 0, 1.0, 0.0))


@triton.jit
def split_decay(x):
    """(kept, rest) with exp(x) = kept + rest, x <= 0: 1 and exp(x) - 1 near 0, else 0 and exp(x).

    Near 1 the float32 exp(x) is off the same way at each chunk, which adds up over a long text;
    S + rest * S rounds without direction.
    """
    # Positive values, which nobody may pass but nobody sees on a GPU, are no small ones either.
    near = tl.abs(x) < 0.5
    y = tl.where(near, x, 0.0)
    # exp(y) - 1 as a Taylor polynomial: the first term left out is 0.5^10 / 10! = 3e-10.
    poly = y / 9.0 + 1.0
    for n in tl.static_range(7):
        poly = poly * y / (8.0 - n) + 1.0
    return tl.where(near, 1.0, 0.0), tl.where(near, y * poly, tl.exp(x))


@triton.jit
def decay_state(state, kept, rest, EXACT: tl.constexpr):
    """exp(g C) * state; EXACT keeps float32 accuracy over many chunks."""
    if EXACT:
        return state * kept + state * rest
    return state * (kept + rest)


@triton.jit
def load_tile(
    pointers, row_inside, dim_inside, TAIL: tl.constexpr, MASK: tl.constexpr, DTYPE: tl.constexpr
):
    """A tile, 0 in rows beyond the tokens (TAIL) and in dims beyond the tensor's (MASK)."""
    if TAIL:
        x = tl.load(pointers, mask=row_inside & dim_inside, other=0.0)
    elif MASK:
        x = tl.load(pointers, mask=dim_inside, other=0.0)
    else:
        x = tl.load(pointers)
    return x.to(DTYPE)


@triton.jit
def as_operand(x, DTYPE: tl.constexpr):
    """x rounded for a product, and the factor to multiply the product by.

    A float16 would overflow where the float32 sum does not, so x is scaled to a largest entry of
    1,024 first.
    """
    if DTYPE == tl.float16:
        top = tl.max(tl.max(tl.abs(x), 1), 0)
        factor = tl.where(top > 1e-35, top / 1024.0, 1.0)
        return (x / factor).to(DTYPE), factor
    return x.to(DTYPE), 1.0


@triton.jit
def product(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a b, a rounded to DTYPE first."""
    a_, factor = as_operand(a, DTYPE)
    return tl.dot(a_, b, input_precision=PRECISION) * factor


@triton.jit
def add_to_state(
    state, k, v, weight, faint, DTYPE: tl.constexpr, PRECISION: tl.constexpr
):
    """state + sum over j of faint * weight_j v_j k_j^T, for v [BE, C] and k [C, BD].

    ``faint`` may be far below a float16's smallest, so there it multiplies the float32 sum.
    """
    if DTYPE == tl.float16:
        weighted, factor = as_operand(v.to(tl.float32) * weight[None, :], DTYPE)
        return state + tl.dot(weighted, k, input_precision=PRECISION) * (factor * faint)
    weighted = (v.to(tl.float32) * (weight * faint)[None, :]).to(DTYPE)
    return tl.dot(weighted, k, acc=state, input_precision=PRECISION)
