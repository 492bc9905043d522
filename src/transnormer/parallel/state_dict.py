"""Tensors of a model or an optimizer between their shares on the ranks and whole ones."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from transnormer.optim import gradient_norm
from transnormer.optim.shares import own_share


def gather_whole(tensors: Mapping[str, Tensor], *, everywhere: bool = False) -> dict[str, Tensor]:
    """Whole tensors on the CPU of rank 0, one after the other; every rank calls it.

    A whole tensor does not depend on how the ranks lay: these are the tensors of one process.

    Args:
        tensors: the same names in the same order on all ranks.
        everywhere: return them on all ranks, not on rank 0 alone.

    Returns:
        the tensors; on the other ranks an empty dictionary.
    """
    keeps, whole = everywhere or dist.get_rank() == 0, {}
    # It warns that a tensor cut along two axes is gathered in two steps, which is meant so here.
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        for name, x in tensors.items():
            x = x.detach()
            full = _full(x) if isinstance(x, DTensor) else x
            if keeps:
                whole[name] = full.to("cpu", copy=True)
            del full
    finally:
        logger.setLevel(level)
    return whole


def _full(x: DTensor) -> Tensor:
    if x.dtype != torch.int16:
        return x.full_tensor()
    # No backend gathers these; their bits pass as those of bfloat16.
    as_bits = DTensor.from_local(
        x.to_local().view(torch.bfloat16),
        x.device_mesh,
        x.placements,
        run_check=False,
        shape=x.shape,
        stride=x.stride(),
    )
    return as_bits.full_tensor().view(torch.int16)


def total_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients, over all ranks, as one plain tensor on every rank.

    sqrt(sum of squares) of gradients that are cut along any axes: every entry counts once, however
    many ranks have it. Sums are in float32 or better.

    Args:
        parameters: of the model; those without a gradient do not count.
    """
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None:
            key = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
            groups.setdefault(key, []).append(grad)
    total: Tensor | None = None
    for key, grads in groups.items():
        # A share may be empty, where there are fewer rows than ranks.
        square = gradient_norm(own_share(grad) for grad in grads).square()
        if key is not None:
            mesh, placements = key
            for dim, placement in enumerate(placements):
                if not placement.is_replicate() and mesh.size(dim) > 1:
                    dist.all_reduce(square, group=mesh.get_group(dim))
        total = square if total is None else total + square
    assert total is not None
    return total.sqrt()
