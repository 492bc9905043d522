"""Modules whose numbers must not be rounded when a model is cast."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class KeepPrecision(nn.Module):
    """A module whose own floating tensors never go below ``lowest`` by .to(), .half() and so on.

    Angles and decays multiply positions: rounding them to bfloat16 moves a far token's phase by
    whole turns and its weight by factors.
    """

    lowest: torch.dtype = torch.float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(x: Tensor) -> Tensor:
            moved = fn(x)
            if not x.is_floating_point() or moved.dtype.itemsize >= self.lowest.itemsize:
                return moved
            return x.to(moved.device, self.lowest)

        return super()._apply(keep, recurse)
