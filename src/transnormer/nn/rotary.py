"""Rotary position encoding: pairs of channels turn with the position."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from transnormer.nn.precision import KeepPrecision
from transnormer.ops.checks import accumulation_dtype

Pairs = Literal["halves", "neighbours"]


def turns(positions: Tensor, theta: Tensor, dtype: torch.dtype) -> Tensor:
    """position x theta mod 2 pi, [batch, seq, *theta.shape] in ``dtype`` from int64 [batch, seq].

    Computed in float64 and reduced before it is rounded, so that position 4,000,000 is as exact as
    position 0. Rows that are views of one row (batch stride 0) are computed once and broadcast:
    the result has then batch 1.
    """
    if positions.shape[0] > 1 and positions.stride(0) == 0:
        positions = positions[:1]
    angles = positions.to(torch.float64).view(*positions.shape, *[1] * theta.dim()) * theta.to(
        torch.float64
    )
    return torch.remainder(angles, 2.0 * math.pi).to(dtype)


class Rotary(KeepPrecision):
    """Rotates pairs of channels of q and k by position x theta: scores depend on the distance.

    Su et al. 2021, arXiv:2104.09864. xPos without its scale (Sun et al. 2023, arXiv:2307.08621) is
    the same with ``last_included`` frequencies and neighbouring pairs. LRPE's rotary form (Qin et
    al. 2022, arXiv:2210.10340) learns theta and reflects by a fixed unit vector first.

    Args:
        head_dim: channels of a head, even.
        base: theta runs from 1 down to 1/base.
        pairs: channel i turns with i + head_dim / 2 ("halves", Hugging Face LLaMA) or 2i with
            2i + 1 ("neighbours", the papers).
        last_included: theta_i = base^(-i / (n - 1)) over the n pairs (torchscale's RetNet) instead
            of base^(-i / n).
        learned: train theta, float32 or better.
        reflect: x - 2 v v^T x first, with a fixed random unit vector v (Householder).
    """

    theta: Tensor
    reflection: Tensor | None

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10_000.0,
        pairs: Pairs = "halves",
        last_included: bool = False,
        learned: bool = False,
        reflect: bool = False,
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; expected an even number for rotary pairs")
        self.head_dim, self.base, self.pairs = head_dim, base, pairs
        self.last_included, self.learned = last_included, learned
        # Fixed frequencies stay float64: float32 would turn position 4,000,000 by 0.1.
        self.lowest = torch.float32 if learned else torch.float64
        dtype = accumulation_dtype(torch.get_default_dtype()) if learned else torch.float64
        theta = torch.empty(head_dim // 2, dtype=dtype)
        if learned:
            self.theta = nn.Parameter(theta)
        else:
            self.register_buffer("theta", theta, persistent=False)
        self.register_buffer("reflection", torch.empty(head_dim, dtype=dtype) if reflect else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        count = self.head_dim // 2
        steps = max(count - 1, 1) if self.last_included else count
        index = torch.arange(count, dtype=torch.float64, device=self.theta.device)
        self.theta.copy_(torch.exp(index * (-math.log(self.base) / steps)))
        if self.reflection is not None:
            nn.init.normal_(self.reflection)
            self.reflection.div_(self.reflection.norm())

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = x.to(cos.dtype)
        if self.reflection is not None:
            v = self.reflection.to(y.dtype)
            y = y - 2.0 * (y @ v)[..., None] * v
        if self.pairs == "halves":
            first, second = y.chunk(2, -1)
            y = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        else:
            first, second = y[..., 0::2], y[..., 1::2]
            turned = (first * cos - second * sin, second * cos + first * sin)
            y = torch.stack(turned, -1).flatten(-2)
        return y.to(x.dtype)

    def forward(self, x: tuple[Tensor, ...], positions: Tensor) -> tuple[Tensor, ...]:
        """Rotate each of x, [batch, seq, heads, head_dim], by int64 positions [batch, seq]."""
        angles = turns(positions, self.theta, accumulation_dtype(x[0].dtype))[:, :, None]
        cos, sin = angles.cos(), angles.sin()
        return tuple(self._rotated(y, cos, sin) for y in x)
