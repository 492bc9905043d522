"""Sums and joins over a group of ranks as functions of autograd.

Within work that ranks share, the gradient of a tensor that all of them have is a share of the whole
one, and the sum over the ranks is left to where the tensor came from.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Later torches warn of the old names, which earlier ones have alone.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)


def _summed(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def gathered(x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
    """The ranks' parts, of one size, one behind the other along a dim."""
    size = dist.get_world_size(group)
    parts = x.new_empty(size * x.numel())
    _all_gather(parts, x.contiguous().view(-1), group=group)
    return parts.view(size, *x.shape).movedim(0, dim).reshape(_times(x.shape, dim, size))


def summed_part(x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
    """This rank's part along a dim, a multiple of the ranks, of the sum of all ranks' tensors."""
    size = dist.get_world_size(group)
    parts = x.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
    total = parts.new_empty(parts[0].shape)
    _reduce_scatter(total.view(-1), parts.view(-1), group=group)
    return total


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


class Gather(torch.autograd.Function):
    """All ranks' parts along a dim, into work that the ranks share; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gathered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return summed_part(grad, ctx.group, ctx.dim), None, None


class Scatter(torch.autograd.Function):
    """This rank's part along a dim of the sum of all ranks' shares."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return summed_part(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gathered(grad, ctx.group, ctx.dim), None, None


class Part(torch.autograd.Function):
    """This rank's part along a dim of what all ranks have, with the whole gradient on each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _own(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gathered(grad, ctx.group, ctx.dim), None, None


class Join(torch.autograd.Function):
    """All ranks' parts along a dim, which every rank goes on with alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gathered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _own(grad, ctx.group, ctx.dim), None, None


def _own(x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
    part = x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]
    return part.contiguous()
