"""AdamW's step of many tensors in one launch, in Triton.

    g = factor g;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p = keep p - rate m / (sqrt(correction v) + eps)

Programs find their tensors by their addresses: each of them takes one block of one tensor. A number
crosses memory once, 28 bytes of it; g stays as it is, unscaled.

Legend: a row of the table is (p, g, m, v, numbers of p), a tile (row of the table, block of it).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.linear_attention.triton_runtime import device_of, launch

# Numbers that a program takes, four loads of 16 bytes a thread and tensor.
BLOCK, _WARPS = 4096, 8
_COLUMNS = 5


@triton.jit
def _at(addresses, column: tl.constexpr, start, ALIGNED: tl.constexpr, B: tl.constexpr):
    """A block of a tensor of the table."""
    address = tl.load(addresses + column).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address + start + tl.arange(0, B)


@triton.jit
def _update(
    row, start, left, keep, rate, correction, factor, b1, rest1, b2, rest2, eps,
    WHOLE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A block of one tensor, whole and aligned or not."""
    live = None if WHOLE else tl.arange(0, B) < left
    p_at, m_at = _at(row, 0, start, WHOLE, B), _at(row, 2, start, WHOLE, B)
    v_at = _at(row, 3, start, WHOLE, B)
    g = tl.load(_at(row, 1, start, WHOLE, B), mask=live) * factor
    m = b1 * tl.load(m_at, mask=live) + rest1 * g
    v = b2 * tl.load(v_at, mask=live) + rest2 * (g * g)
    p = keep * tl.load(p_at, mask=live) - rate * (m / (tl.sqrt(v * correction) + eps))
    tl.store(m_at, m, mask=live)
    tl.store(v_at, v, mask=live)
    tl.store(p_at, p, mask=live)


@triton.jit
def adamw_kernel(
    table, tiles, numbers, factor, b1, rest1, b2, rest2, eps, COLUMNS: tl.constexpr, B: tl.constexpr
):
    """A block of one tensor; one without a gradient has the address 0 there."""
    which = tl.load(tiles + 2 * tl.program_id(0))
    start = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int64) * B
    row = table + which * COLUMNS
    g = tl.load(row + 1)
    if g != 0:
        keep = tl.load(numbers + which * 3)
        rate = tl.load(numbers + which * 3 + 1)
        correction = tl.load(numbers + which * 3 + 2)
        scale, left = tl.load(factor), tl.load(row + 4) - start
        places = g | tl.load(row) | tl.load(row + 2) | tl.load(row + 3)
        # Without a mask and from multiples of 16 bytes, loads are of 16 bytes.
        if (left >= B) & (places % 16 == 0):
            _update(
                row, start, left, keep, rate, correction, scale, b1, rest1, b2, rest2, eps,
                WHOLE=True, B=B,
            )  # fmt: skip
        else:
            _update(
                row, start, left, keep, rate, correction, scale, b1, rest1, b2, rest2, eps,
                WHOLE=False, B=B,
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
    factor: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Make the step.

    Args:
        table: int64 [tensors, 5], on the device, as all of these.
        tiles: of ``tiles_of``.
        numbers: (keep, rate, correction), float32 [tensors, 3].
        factor: float32 [].
        betas, eps: of all tensors.
    """
    b1, b2 = betas
    with device_of(table):
        launch(
            adamw_kernel, tiles.shape[0], table, tiles, numbers, factor, b1, 1 - b1, b2, 1 - b2,
            eps, COLUMNS=_COLUMNS, B=BLOCK, num_warps=_WARPS,
        )  # fmt: skip
