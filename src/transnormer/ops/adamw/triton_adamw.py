"""AdamW's step of many tensors in one launch, in Triton.

    g = factor g;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    w = keep w - rate m / (sqrt(correction v) + eps)

Programs find their tensors by their addresses: each of them takes one block of one tensor. A number
crosses memory once, 28 bytes of it where all is float32; g stays as it is, unscaled.

w is the parameter p, or a bfloat16 p with the 16 bits r beside it that p rounds away: together a float32
(``optim.split_weights``). A bfloat16 p without them, and bfloat16 moments, are rounded stochastically
(Zamirai et al. 2020, arXiv:2010.06192). The random bits are Philox's (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"): one call of four words for two numbers, 16 bits for each of p, m
and v.

Legend: a row of the table is (p, g, m, v, r or 0, numbers of p), a tile (its row, block of it).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.linear_attention.triton_runtime import device_of, launch

# Numbers that a program takes, four loads of 16 bytes a thread and tensor.
BLOCK, _WARPS = 4096, 8
_COLUMNS = 6
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
# The fewest with which Philox passes its authors' tests.
_ROUNDS: tl.constexpr = tl.constexpr(7)


@triton.jit
def _at(
    addresses, column: tl.constexpr, start,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A block of a tensor of the table."""
    address = tl.load(addresses + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address + start + tl.arange(0, B)


@triton.jit
def _stored(at, x, bits, live, DTYPE: tl.constexpr):
    """Store float32 as it is, or as bfloat16, up or down by the low 16 of the random bits."""
    if DTYPE == tl.bfloat16:
        carried = (x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
        # The bits of a NaN may be carried over into a number's.
        tl.store(
            at, tl.where(x == x, carried.to(tl.float32, bitcast=True), x).to(tl.bfloat16), live
        )
    else:
        tl.store(at, x, mask=live)


@triton.jit
def _joined(p_at, r_at, live):
    """The float32 of a bfloat16's bits, upper, and a signed remainder, lower."""
    upper = tl.load(p_at, mask=live).to(tl.int32) << 16
    return (upper + tl.load(r_at, mask=live).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _store_split(p_at, r_at, x, live):
    """Store what ``_joined`` reads; of a NaN the first half is one."""
    bits = x.to(tl.int32, bitcast=True)
    tl.store(p_at, tl.where(x == x, (bits + 0x8000) >> 16, 0x7FC0).to(tl.int16), mask=live)
    tl.store(r_at, tl.where(x == x, ((bits + 0x8000) & 0xFFFF) - 0x8000, 0).to(tl.int16), mask=live)


@triton.jit
def _update(
    row, start, left, keep, rate, correction, factor, b1, rest1, b2, rest2, eps, bits_p, bits_m, bits_v,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Some numbers of one tensor, all of them there and aligned or not."""
    live = None if WHOLE else tl.arange(0, B) < left
    g_at = _at(row, 1, start, G, WHOLE, B)
    m_at, v_at = _at(row, 2, start, M, WHOLE, B), _at(row, 3, start, M, WHOLE, B)
    g = tl.load(g_at, mask=live).to(tl.float32) * factor
    m = b1 * tl.load(m_at, mask=live).to(tl.float32) + rest1 * g
    v = b2 * tl.load(v_at, mask=live).to(tl.float32) + rest2 * (g * g)
    step = rate * (m / (tl.sqrt(v * correction) + eps))
    _stored(m_at, m, bits_m, live, M)
    _stored(v_at, v, bits_v, live, M)
    if SPLIT:
        p_at, r_at = _at(row, 0, start, tl.int16, WHOLE, B), _at(row, 4, start, tl.int16, WHOLE, B)
        _store_split(p_at, r_at, keep * _joined(p_at, r_at, live) - step, live)
    else:
        p_at = _at(row, 0, start, P, WHOLE, B)
        _stored(p_at, keep * tl.load(p_at, mask=live).to(tl.float32) - step, bits_p, live, P)


@triton.jit
def _block(
    row, start, left, keep, rate, correction, factor, b1, rest1, b2, rest2, eps, seed,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A block of one tensor; where anything is rounded at random, one half after the other."""
    if M == tl.bfloat16 or (P == tl.bfloat16 and not SPLIT):
        H: tl.constexpr = B // 2
        a, b, c, d = tl.randint4x(seed, start // 2 + tl.arange(0, H), n_rounds=_ROUNDS)
        _update(
            row, start, left, keep, rate, correction, factor, b1, rest1, b2, rest2, eps,
            a, a >> 16, b, P, G, M, SPLIT, WHOLE, H,
        )  # fmt: skip
        _update(
            row, start + H, left - H, keep, rate, correction, factor, b1, rest1, b2, rest2, eps,
            b >> 16, c, c >> 16, P, G, M, SPLIT, WHOLE, H,
        )  # fmt: skip
    else:
        _update(
            row, start, left, keep, rate, correction, factor, b1, rest1, b2, rest2, eps,
            0, 0, 0, P, G, M, SPLIT, WHOLE, B,
        )  # fmt: skip


@triton.jit
def adamw_kernel(
    table, tiles, numbers, seeds, factor, b1, rest1, b2, rest2, eps,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, SPLIT: tl.constexpr,
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
        seed = tl.load(seeds + which) if M == tl.bfloat16 or P == tl.bfloat16 else 0
        scale, left = tl.load(factor), tl.load(row + 5) - start
        places = g | tl.load(row) | tl.load(row + 2) | tl.load(row + 3) | tl.load(row + 4)
        # Without a mask and from multiples of 16 bytes, loads are of 16 bytes.
        if (left >= B) & (places % 16 == 0):
            _block(
                row, start, left, keep, rate, correction, scale, b1, rest1, b2, rest2, eps, seed,
                P, G, M, SPLIT, WHOLE=True, B=B,
            )  # fmt: skip
        else:
            _block(
                row, start, left, keep, rate, correction, scale, b1, rest1, b2, rest2, eps, seed,
                P, G, M, SPLIT, WHOLE=False, B=B,
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
    split: bool,
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
        split: whether parameters have the rest of float32 weights beside them.
    """
    b1, b2 = betas
    p, g, m = (_DTYPES[dtype] for dtype in dtypes)
    with device_of(table):
        launch(
            adamw_kernel, tiles.shape[0], table, tiles, numbers, seeds, factor, b1, 1 - b1, b2, 1 - b2,
            eps, P=p, G=g, M=m, SPLIT=split, COLUMNS=_COLUMNS, B=BLOCK, num_warps=_WARPS,
        )  # fmt: skip
