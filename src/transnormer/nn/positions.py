"""Position encodings that take positions and never count them."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from transnormer.nn.grid import check_extents, coordinates
from transnormer.nn.precision import KeepPrecision
from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.lrpe import doubled, lrpe, turns

LrpeInit = Literal["global", "head", "half"]


class Lrpe(KeepPrecision):
    """Linearized relative position encoding by cosine doubling (LRPE-d).

    x at position t becomes [x * cos(t theta); x * sin(t theta)], so that the score of a query and a
    key is sum_j q_j k_j cos((t - s) theta_j): relative, at twice the key dim. theta is learned.
    Angles are position x theta in float64, reduced mod 2 pi, then rounded to the accumulation dtype
    (float32; float64 in a float64 model), so that scores at position 4,000,000 are those at 0.
    Source: Qin et al. 2023, arXiv:2307.14995, section 3.1; Qin et al. 2023, arXiv:2307.09270.

    Args:
        heads: number of heads.
        head_dim: key dim before doubling.
        init: "global": theta_j = base^(-2j/d) with j counted over all heads (the released weights);
            "head": over each head's own dims; "half": as "head" with 0 in place of the lower half
            of the frequencies, where it stays, since cos is flat at 0.
        base: of the frequencies.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        init: LrpeInit = "global",
        base: float = 10_000.0,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.init, self.base = heads, head_dim, init, base
        # Some loaders build a model under a default dtype of bfloat16.
        dtype = accumulation_dtype(torch.get_default_dtype())
        self.theta = nn.Parameter(torch.empty(heads, 1, head_dim, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        dim = self.heads * self.head_dim if self.init == "global" else self.head_dim
        index = torch.arange(dim, dtype=torch.float64, device=self.theta.device)
        theta = torch.exp(index * (-2.0 * math.log(self.base) / dim))
        if self.init == "half":
            theta[(dim + 1) // 2 :] = 0.0
        if self.init != "global":
            theta = theta.repeat(self.heads)
        self.theta.copy_(theta.view(self.heads, 1, self.head_dim))

    def angles(self, positions: Tensor) -> Tensor:
        """position x theta mod 2 pi, [batch or 1, seq, heads, head_dim]; see ``turns``."""
        return turns(positions, self.theta[:, 0], accumulation_dtype(self.theta.dtype))

    def forward(self, x: tuple[Tensor, ...], positions: Tensor) -> tuple[Tensor, ...]:
        """Encode each of x, [batch, seq, heads, head_dim] -> [batch, seq, heads, 2 * head_dim]."""
        return lrpe(x, positions, self.theta[:, 0])


class MdLrpe(Lrpe):
    """LRPE over several axes (MD-LRPE): each axis turns its own part of the channels.

    A token with coordinates s_1 .. s_k has the angles [s_1 theta, .., s_k theta], cut to head_dim;
    the score of a query and a key is sum_j sum_c q_c k_c cos((s_j - s'_j) theta_c), c over the part
    of axis j: it depends on the differences of coordinates alone. One axis is LRPE.
    Source: Qin et al. 2024, arXiv:2405.21022, section 3 (MD-LRPE); the axes share theta, as in the
    authors' code.

    Args:
        heads: number of heads.
        head_dim: key dim before doubling.
        axes: k; theta is [heads, 1, ceil(head_dim / k)].
        condition_tokens: leading tokens (a class, a condition) with angle 0; the rest is the grid.
        init: of theta, over one axis' part, see ``Lrpe``.
        base: of the frequencies.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        axes: int = 1,
        condition_tokens: int = 0,
        init: LrpeInit = "global",
        base: float = 10_000.0,
    ) -> None:
        super().__init__(heads, -(-head_dim // axes), init=init, base=base)
        self.axes, self.condition_tokens, self.rotated_dim = axes, condition_tokens, head_dim

    def _coordinates(self, positions: Tensor, shape: tuple[int, ...] | None) -> list[Tensor]:
        """Coordinates of the tokens along each axis, int64 [batch or 1, seq] each."""
        if self.axes == 1 and not self.condition_tokens:
            if shape is not None:
                check_extents(shape, 1, positions.shape[1])
            return [positions]
        extents = check_extents(shape, self.axes, positions.shape[1] - self.condition_tokens)
        lead = positions.new_zeros(self.condition_tokens)
        return [torch.cat([lead, x])[None] for x in coordinates(extents, positions.device)]

    def angles(self, positions: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Angles mod 2 pi, [batch or 1, seq, heads, head_dim].

        Args:
            positions: int64 [batch, seq]; used where there is one axis and no condition token.
            shape: extents of the axes, row-major; their product is seq without condition tokens.

        Raises:
            ValueError: a shape of other axes or of another number of tokens, or none where there
                are several axes or condition tokens.
        """
        parts = [super(MdLrpe, self).angles(x) for x in self._coordinates(positions, shape)]
        return torch.cat(parts, -1)[..., : self.rotated_dim]

    def forward(
        self, x: tuple[Tensor, ...], positions: Tensor, shape: tuple[int, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """Encode each of x, [batch, seq, heads, head_dim] -> [batch, seq, heads, 2 * head_dim]."""
        if self.axes == 1 and not self.condition_tokens:
            (where,) = self._coordinates(positions, shape)
            return super().forward(x, where)
        return doubled(x, self.angles(positions, shape))
