"""Sums and joins over a group of ranks as functions of autograd.

Within work that ranks share, the gradient of a tensor that all of them have is a share of the whole
one, and the sum over the ranks is left to where the tensor came from.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Map = Callable[[Tensor, dist.ProcessGroup | None, int], Tensor]

# Sums and joins as functions of tensors, which compiled graphs hold: what is written in place in a
# function of autograd, graphs of earlier torches lose.
_C10D = torch.ops._c10d_functional


def _name(group: dist.ProcessGroup | None) -> str:
    group = dist.group.WORLD if group is None else group
    assert group is not None
    return group.group_name


def _summed(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return _C10D.wait_tensor(_C10D.all_reduce(x.contiguous(), "sum", _name(group)))


def gathered(x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
    """The ranks' parts, of one size, one behind the other along a dim."""
    size = dist.get_world_size(group)
    parts = _C10D.all_gather_into_tensor(x.contiguous().view(-1), size, _name(group))
    parts = _C10D.wait_tensor(parts).view(size, *x.shape)
    return parts.movedim(0, dim).reshape(_times(x.shape, dim, size))


def summed_part(x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
    """This rank's part along a dim, a multiple of the ranks, of the sum of all ranks' tensors."""
    size = dist.get_world_size(group)
    parts = x.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
    total = _C10D.reduce_scatter_tensor(parts.view(-1), "sum", size, _name(group))
    return _C10D.wait_tensor(total).view(parts.shape[1:])


def _own(x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
    part = x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]
    return part.contiguous()


def _times(shape: torch.Size, dim: int, size: int) -> list[int]:
    return [n * size if i == dim else n for i, n in enumerate(shape)]


class Copy(torch.autograd.Function):
    """The same tensor on every rank, into work that the ranks share; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class Reduce(torch.autograd.Function):
    """The sum of all ranks' shares, which every rank goes on with; its gradient is that of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Total(torch.autograd.Function):
    """The sum of all ranks' shares within work that they share: gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


def _along(ahead: Map, back: Map) -> tuple[Any, Any]:
    """The methods of a function of (x, group, dim): x goes by one map, its gradient by the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return ahead(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return back(grad, ctx.group, ctx.dim), None, None

    return forward, backward


class Gather(torch.autograd.Function):
    """All ranks' parts along a dim, into work that the ranks share; gradients are summed."""

    forward, backward = _along(gathered, summed_part)


class Scatter(torch.autograd.Function):
    """This rank's part along a dim of the sum of all ranks' shares."""

    forward, backward = _along(summed_part, gathered)


class Part(torch.autograd.Function):
    """This rank's part along a dim of what all ranks have, with the whole gradient on each."""

    forward, backward = _along(_own, gathered)


class Join(torch.autograd.Function):
    """All ranks' parts along a dim, which every rank goes on with alike."""

    forward, backward = _along(gathered, _own)
