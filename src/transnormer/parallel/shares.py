"""What of a whole tensor lies on this rank, and where: the pieces that checkpoints are made of."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from transnormer.parallel.tensor_layers import Fused


class Piece(NamedTuple):
    """A block of a whole tensor.

    Attributes:
        offsets: of its first entry in the whole tensor.
        values: the entries; a view of what this rank holds.
    """

    offsets: tuple[int, ...]
    values: Tensor

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where it lies in the whole tensor."""
        ends = zip(self.offsets, self.values.shape, strict=True)
        return tuple(slice(start, start + size) for start, size in ends)


class Share(NamedTuple):
    """What this rank holds of one tensor.

    Attributes:
        shape: of the whole tensor.
        dtype: of it.
        pieces: of it; none where the rank holds nothing of it, or another one writes it.
    """

    shape: torch.Size
    dtype: torch.dtype
    pieces: list[Piece]


def share_of(x: Tensor, fused: Fused | None = None, *, writes: bool = True) -> Share:
    """The pieces of a tensor on this rank, in the order of rows that one process has.

    Args:
        x: laid out along the axes of a mesh, or whole on every rank.
        fused: how its entries lie where layers are shared among ranks; None is as in one process.
        writes: whether the pieces count; False gives none.
    """
    if not writes:
        return Share(x.shape, x.dtype, [])
    x = x.detach()
    if not isinstance(x, DTensor):
        return Share(x.shape, x.dtype, [Piece((0,) * x.ndim, x)])
    local, offsets = x.to_local(), _offsets(x)
    if local.numel() == 0:
        return Share(x.shape, x.dtype, [])
    if fused is None:
        return Share(x.shape, x.dtype, [Piece(offsets, local)])
    dim = fused.dim
    entries = fused.order()[offsets[dim] : offsets[dim] + local.shape[dim]]
    breaks = (entries.diff() != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist(), len(entries)]
    pieces = [
        Piece((*offsets[:dim], int(entries[a]), *offsets[dim + 1 :]), local.narrow(dim, a, b - a))
        for a, b in zip(starts, starts[1:], strict=False)
    ]
    return Share(x.shape, x.dtype, pieces)


def _offsets(x: DTensor) -> tuple[int, ...]:
    """Where this rank's block begins: cut by layer shares first, the rest of it by rows."""
    offsets, sizes = [0] * x.ndim, list(x.shape)
    names = x.device_mesh.mesh_dim_names or ()
    axes = sorted(range(len(x.placements)), key=lambda axis: names[axis : axis + 1] != ("tp",))
    for axis in axes:
        placement: Any = x.placements[axis]
        if placement.is_replicate():
            continue
        # As torch.chunk cuts: the last ones may have less, or nothing.
        size = sizes[placement.dim]
        share = -(-size // x.device_mesh.size(axis))
        start = min(share * x.device_mesh.get_local_rank(axis), size)
        offsets[placement.dim] += start
        sizes[placement.dim] = min(start + share, size) - start
    if tuple(sizes) != tuple(x.to_local().shape):
        raise ValueError(
            f"a tensor of shape {list(x.shape)} has {list(x.to_local().shape)} on this rank; "
            f"expected {sizes} for the placements {x.placements}"
        )
    return tuple(offsets)


@torch.no_grad()
def fill(share: Share, whole: Any) -> None:
    """Copy a rank's pieces out of a whole tensor, or out of a file that is read by slices.

    Raises:
        ValueError: a tensor of another shape.
    """
    shape = whole.shape if isinstance(whole, Tensor) else torch.Size(whole.get_shape())
    if shape != share.shape:
        raise ValueError(f"it has shape {list(shape)}; expected {list(share.shape)}")
    for piece in share.pieces:
        piece.values.copy_(whole[piece.slices])


def fill_all(shares: Mapping[str, Share], whole: Mapping[str, Any]) -> None:
    """``fill`` by name; names must be exactly the same.

    Raises:
        ValueError: names that one of them lacks, or another shape.
    """
    if other := sorted(shares.keys() ^ whole.keys()):
        raise ValueError(
            f"{other[0]} is in one of model and checkpoint alone; expected the same names; use the "
            "checkpoint's own configuration"
        )
    for name, share in shares.items():
        try:
            fill(share, whole[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}; use the checkpoint's own configuration") from error


def states_like(states: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for an optimizer's state, "parameter name/key", laid out as its parameters are.

    Raises:
        ValueError: the state of a parameter that is not there.
    """
    like = {}
    for name in states:
        owner, whole = name.rpartition("/")[0], states[name]
        if owner not in parameters:
            raise ValueError(
                f"optimizer state has {owner}; expected only parameters of this model; use the "
                "checkpoint's own configuration"
            )
        if isinstance(whole, Tensor) and whole.ndim == 0:
            like[name] = torch.zeros_like(whole)
        else:
            like[name] = torch.zeros_like(parameters[owner].detach(), dtype=whole[:0].dtype)
    return like
