"""Rotary position encoding: pairs of channels turn with the position."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from transnormer.nn.grid import check_extents, coordinates
from transnormer.nn.precision import KeepPrecision
from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.lrpe import turns

Pairs = Literal["halves", "neighbours"]


@torch.library.custom_op("transnormer::rotary_table", mutates_args=())
def rotary_table(positions: Tensor, theta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position x theta, [batch or 1, seq, pairs] each, in dtype; no gradients.

    An op of its own for compiled graphs: a compiler that sees the float64 angles computes them
    anew for each head of each tensor that turns.
    """
    angles = turns(positions, theta, dtype)
    return angles.cos(), angles.sin()


@rotary_table.register_fake
def _(positions: Tensor, theta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = turns(positions, theta, dtype)
    return angles, torch.empty_like(angles)


class Rotary(KeepPrecision):
    """Rotates pairs of channels of q and k by position x theta: scores depend on the distance.

    Su et al. 2021, arXiv:2104.09864. xPos without its scale (Sun et al. 2023, arXiv:2307.08621) is
    the same with ``last_included`` frequencies and neighbouring pairs. LRPE's rotary form (Qin et
    al. 2022, arXiv:2210.10340) learns theta and reflects by a fixed unit vector first.

    A token of a grid, with coordinates s_1 .. s_k, has the angles [s_1 theta, .., s_k theta], cut to
    head_dim / 2: each axis turns its own share of the pairs, and scores depend on the differences of
    coordinates. The axes share theta, as in ``MdLrpe``.

    Args:
        head_dim: channels of a head, even.
        base: theta runs from 1 down to 1/base.
        pairs: channel i turns with i + head_dim / 2 ("halves", Hugging Face LLaMA) or 2i with
            2i + 1 ("neighbours", the papers).
        last_included: theta_i = base^(-i / (n - 1)) over the n pairs (torchscale's RetNet) instead
            of base^(-i / n).
        learned: train theta, float32 or better.
        reflect: x - 2 v v^T x first, with a fixed random unit vector v (Householder).
        axes: k; theta has ceil(head_dim / 2 / k) frequencies. One axis turns by ``positions``.
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
        axes: int = 1,
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; expected an even number for rotary pairs")
        self.head_dim, self.base, self.pairs = head_dim, base, pairs
        self.last_included, self.learned, self.axes = last_included, learned, axes
        # Fixed frequencies stay float64: float32 would turn position 4,000,000 by 0.1.
        self.lowest = torch.float32 if learned else torch.float64
        dtype = accumulation_dtype(torch.get_default_dtype()) if learned else torch.float64
        theta = torch.empty(-(-head_dim // (2 * axes)), dtype=dtype)
        if learned:
            self.theta = nn.Parameter(theta)
        else:
            self.register_buffer("theta", theta, persistent=False)
        self.register_buffer("reflection", torch.empty(head_dim, dtype=dtype) if reflect else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        count = self.theta.shape[0]
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

    def _angles(
        self, positions: Tensor, shape: tuple[int, ...] | None, dtype: torch.dtype
    ) -> Tensor:
        """Angles of the pairs mod 2 pi, [batch or 1, seq, head_dim / 2]."""
        if self.axes == 1:
            return turns(positions, self.theta, dtype)
        extents = check_extents(shape, self.axes, positions.shape[1])
        where = coordinates(extents, positions.device)
        parts = [turns(axis[None], self.theta, dtype) for axis in where]
        return torch.cat(parts, -1)[..., : self.head_dim // 2]

    def forward(
        self, x: tuple[Tensor, ...], positions: Tensor, shape: tuple[int, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """Rotate each of x, [batch, seq, heads, head_dim].

        Args:
            x: any number of tensors.
            positions: int64 [batch, seq]; what one axis turns by.
            shape: extents of the axes, whose product is seq; one axis ignores it.

        Raises:
            ValueError: several axes, and a shape of other axes or of another number of tokens.
        """
        dtype = accumulation_dtype(x[0].dtype)
        if self.axes == 1 and not self.learned and torch.compiler.is_dynamo_compiling():
            cos, sin = torch.ops.transnormer.rotary_table(positions, self.theta, dtype)
        else:
            angles = self._angles(positions, shape, dtype)
            cos, sin = angles.cos(), angles.sin()
        return tuple(self._rotated(y, cos[:, :, None], sin[:, :, None]) for y in x)
