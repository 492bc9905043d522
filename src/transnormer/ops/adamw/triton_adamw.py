"""AdamW's step of many tensors in one launch, in Triton.

    g = factor g;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    w = keep w - rate m / (sqrt(correction v) + eps)

Programs find their tensors by their addresses: each of them takes one block of one tensor. A number
crosses memory once, 28 bytes of it where all is float32; g stays as it is, unscaled.

What is bfloat16 of the parameter p and the moments is rounded stochastically (Zamirai et al. 2020,
arXiv:2010.06192), unless p is a copy, rounded to the nearest, of float32 weights w beside it. The
random bits are Philox's (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): one call
of four words for two numbers, 16 bits for each of p, m and v.

Legend: a row of the table is (p, g, m, v, w or 0, numbers of p), a tile (its row, block of it).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.linear_attention.triton_runtime import device_of, launch

# Numbers that a program takes, four loads of 16 bytes a thread and tensor.
BLOCK, _WARPS = 4096, 8
_COLUMNS = 6
# The fewest with which Philox passes its authors' tests.
_ROUNDS: tl.constexpr = tl.constexpr(7)


@triton.jit
def _at(
    addresses, column: tl.constexpr, start,
    HALF: tl.constexpr, ALIGNED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A block of a tensor of the table, of bfloat16 or float32."""
    if HALF:
        address = tl.load(addresses + column).to(tl.pointer_type(tl.bfloat16))
    else:
        address = tl.load(addresses + column).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address + start + tl.arange(0, B)


@triton.jit
def _stored(at, x, bits, live, HALF: tl.constexpr):
    """Store float32 as it is, or as bfloat16, up or down by the low 16 of the random bits."""
    if HALF:
        carried = (x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
        # The bits of a NaN may be carried over into a number's.
        tl.store(
            at, tl.where(x == x, carried.to(tl.float32, bitcast=True), x).to(tl.bfloat16), live
        )
    else:
        tl.store(at, x, mask=live)


@triton.jit
def _update(
    row, start, left, keep, rate, correction, factor, b1, rest1, b2, rest2, eps, bits_p, bits_m, bits_v,
    P16: tl.constexpr, G16: tl.constexpr, M16: tl.constexpr, COPY: tl.constexpr,
    WHOLE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Some numbers of one tensor, all of them there and aligned or not."""
    live = None if WHOLE else tl.arange(0, B) < left
    p_at, g_at = _at(row, 0, start, P16, WHOLE, B), _at(row, 1, start, G16, WHOLE, B)
    m_at, v_at = _at(row, 2, start, M16, WHOLE, B), _at(row, 3, start, M16, WHOLE, B)
    w_at = _at(row, 4, start, False, WHOLE, B) if COPY else p_at
    g = tl.load(g_at, mask=live).to(tl.float32) * factor
    m = b1 * tl.load(m_at, mask=live).to(tl.float32) + rest1 * g
    v = b2 * tl.load(v_at, mask=live).to(tl.float32) + rest2 * (g * g)
    w = keep * tl.load(w_at, mask=live).to(tl.float32) - rate * (
        m / (tl.sqrt(v * correction) + eps)
    )
    _stored(m_at, m, bits_m, live, M16)
    _stored(v_at, v, bits_v, live, M16)
    if COPY:
        tl.store(w_at, w, mask=live)
        # To the nearest, of two as near to the even one.
        _stored(p_at, w, 0x7FFF + ((w.to(tl.uint32, bitcast=True) >> 16) & 1), live, True)
    else:
        _stored(p_at, w, bits_p, live, P16)


@triton.jit
def _block(
    row, start, left, keep, rate, correction, factor, b1, rest1, b2, rest2, eps, seed,
    P16: tl.constexpr, G16: tl.constexpr, M16: tl.constexpr, COPY: tl.constexpr,
    WHOLE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A block of one tensor; where anything is rounded at random, one half after the other."""
    if M16 or (P16 and not COPY):
        H: tl.constexpr = B // 2
        a, b, c, d = tl.randint4x(seed, start // 2 + tl.arange(0, H), n_rounds=_ROUNDS)
        _update(
            row, start, left, keep, rate, correction, factor, b1, rest1, b2, rest2, eps,
            a, a >> 16, b, P16, G16, M16, COPY, WHOLE, H,
        )  # fmt: skip
        _update(
            row, start + H, left - H, keep, rate, correction, factor, b1, rest1, b2, rest2, eps,
            b >> 16, c, c >> 16, P16, G16, M16, COPY, WHOLE, H,
        )  # fmt: skip
    else:
        _update(
            row, start, left, keep, rate, correction, factor, b1, rest1, b2, rest2, eps,
            0, 0, 0, P16, G16, M16, COPY, WHOLE, B,
        )  # fmt: skip


@triton.jit
def adamw_kernel(
    table, tiles, numbers, seeds, factor, b1, rest1, b2, rest2, eps,
    P16: tl.constexpr, G16: tl.constexpr, M16: tl.constexpr, COPY: tl.constexpr,
    COLUMNS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A block of one tensor; one without a gradient has the address 0 there."""
    which = tl.load(tiles + 2 * tl.program_id(0))
    start = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64) * B
    row = table + which * COLUMNS
    g = tl.load(row + 1)
    if g != 0:
        keep = tl.load(numbers + which * 3)
        rate = tl.load(numbers + which * 3 + 1)
        correction = tl.load(numbers + which * 3 + 2)
        seed = tl.load(seeds + which) if M16 or P16 else 0
        scale, left = tl.load(factor), tl.load(row + 5) - start
        places = g | tl.load(row) | tl.load(row + 2) | tl.load(row + 3) | tl.load(row + 4)
        # Without a mask and from multiples of 16 bytes, loads are of 16 bytes.
        if (left >= B) & (places % 16 == 0):
            _block(
                row, start, left, keep, rate, correction, scale, b1, rest1, b2, rest2, eps, seed,
                P16, G16, M16, COPY, WHOLE=True, B=B,
            )  # fmt: skip
        else:
            _block(
                row, start, left, keep, rate, correction, scale, b1, rest1, b2, rest2, eps, seed,
                P16, G16, M16, COPY, WHOLE=False, B=B,
            )  # fmt: skip


def tiles_of(sizes: list[int]) -> Tensor:
    """(tensor, block of it) for every block, int32 [blocks, 2] on the CPU."""
    blocks = torch.tensor([-(-size // BLOCK) for size in sizes])
    which = torch.arange(len(sizes)).repeat_interleave(blocks)
    first = blocks.cumsum(0) - blocks
    return torch.stack([which, torch.arange(len(which)) - first[which]], 1).to(torch.int32)


def step(
    table: Tensor,
    tiles: Tensor,
    numbers: Tensor,
    seeds: Tensor,
    factor: Tensor,
    betas: tuple[float, float],
    eps: float,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    copies: bool,
) -> None:
    """Make the step.

    Args:
        table: int64 [tensors, 6], on the device, as all of these.
        tiles: of ``tiles_of``.
        numbers: (keep, rate, correction), float32 [tensors, 3].
        seeds: int64 [tensors], where anything is rounded at random.
        factor: float32 [].
        betas, eps: of all tensors.
        dtypes: of parameters, gradients and moments, float32 or bfloat16.
        copies: whether parameters are copies of float32 weights beside them.
    """
    b1, b2 = betas
    p16, g16, m16 = (dtype == torch.bfloat16 for dtype in dtypes)
    with device_of(table):
        launch(
            adamw_kernel, tiles.shape[0], table, tiles, numbers, seeds, factor, b1, 1 - b1, b2, 1 - b2,
            eps, P16=p16, G16=g16, M16=m16, COPY=copies, COLUMNS=_COLUMNS, B=BLOCK, num_warps=_WARPS,
        )  # fmt: skip
