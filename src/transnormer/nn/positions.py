"""Position encodings that take positions and never count them."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from transnormer.nn.precision import KeepPrecision
from transnormer.nn.rotary import turns
from transnormer.ops.checks import accumulation_dtype


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
            "head": over each head's own dims.
        base: of the frequencies.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        init: Literal["global", "head"] = "global",
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
        if self.init == "head":
            theta = theta.repeat(self.heads)
        self.theta.copy_(theta.view(self.heads, 1, self.head_dim))

    def angles(self, positions: Tensor) -> Tensor:
        """position x theta mod 2 pi, [batch or 1, seq, heads, head_dim]; see ``turns``."""
        return turns(positions, self.theta[:, 0], accumulation_dtype(self.theta.dtype))

    def forward(self, x: tuple[Tensor, ...], positions: Tensor) -> tuple[Tensor, ...]:
        """Encode each of x, [batch, seq, heads, head_dim] -> [batch, seq, heads, 2 * head_dim]."""
        angles = self.angles(positions)
        cos, sin = angles.cos(), angles.sin()
        return tuple(torch.cat([y * cos, y * sin], -1).to(y.dtype) for y in x)
