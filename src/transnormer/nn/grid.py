"""Tokens of a grid, row-major along seq: extents, coordinates, and blocks of neighbours."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def check_extents(shape: tuple[int, ...] | None, axes: int, seq: int) -> tuple[int, ...]:
    """The shape, if it has this many axes and holds seq tokens; raises ValueError otherwise."""
    if shape is None or len(shape) != axes:
        raise ValueError(f"shape is {shape}; expected {axes} extents, one an axis")
    if math.prod(shape) != seq:
        raise ValueError(
            f"shape is {tuple(shape)}, {math.prod(shape)} tokens; expected the {seq} of the input"
        )
    return tuple(shape)


def coordinates(shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Coordinates of the tokens of a grid along each axis, int64 [product of shape] each."""
    axes = (torch.arange(extent, device=device) for extent in shape)
    return [axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]


def to_blocks(x: Tensor, shape: tuple[int, ...], block_shape: tuple[int, ...]) -> Tensor:
    """Cut a grid into blocks: [batch, seq, ...] -> [batch, blocks, slots, ...].

    Blocks begin at the grid's first token and are row-major, slots within a block too. The last
    block of an axis that it does not divide is filled up with 0 (False).
    """
    axes, rest = len(shape), x.dim() - 2
    x = x.unflatten(1, shape)
    # Pairs of (before, after) from the last dim on.
    padding = [0, 0] * rest
    for extent, block in zip(reversed(shape), reversed(block_shape), strict=True):
        padding += [0, -extent % block]
    x = F.pad(x, padding)
    for axis in reversed(range(axes)):
        x = x.unflatten(1 + axis, (-1, block_shape[axis]))
    # [batch, count, block, count, block, ...] to all counts and then all blocks.
    counts, inner = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
    x = x.permute(0, *counts, *inner, *range(2 * axes + 1, 2 * axes + 1 + rest))
    return x.flatten(1 + axes, 2 * axes).flatten(1, axes)


def from_blocks(x: Tensor, shape: tuple[int, ...], block_shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``to_blocks``: [batch, blocks, slots, ...] -> [batch, seq, ...]."""
    axes, rest = len(shape), x.dim() - 3
    counts = [-(-extent // block) for extent, block in zip(shape, block_shape, strict=True)]
    x = x.unflatten(2, block_shape).unflatten(1, counts)
    pairs = [dim for axis in range(axes) for dim in (1 + axis, 1 + axes + axis)]
    x = x.permute(0, *pairs, *range(2 * axes + 1, 2 * axes + 1 + rest))
    for axis, extent in enumerate(shape):
        x = x.flatten(1 + axis, 2 + axis).narrow(1 + axis, 0, extent)
    return x.flatten(1, axes)
