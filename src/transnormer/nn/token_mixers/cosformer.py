"""cosFormer: linear attention whose weights are re-weighted by a cosine of the distance."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from transnormer.nn.core import LinearAttentionCore
from transnormer.nn.state import zeros
from transnormer.nn.token_mixers.base import TokenMixer, TokenMixerBase
from transnormer.ops.checks import accumulation_dtype, values_are_visible

# Columns of ones behind the values, of which the first is read: kernels take multiples of 4.
_ONES = 4
# The least denominator, where no weight is above 0 (released code).
_LEAST = 1e-6


class CosformerConfig(TokenMixerBase):
    """cosFormer attention.

    Attributes:
        heads: attention heads; head_dim is model_dim / heads.
        max_positions: M, at which the weight of a key reaches 0; positions stay below it. The
            released code takes the current length, which changes the weights of tokens that were
            read before; here it is fixed.
        out_proj: multiply the merged heads by W_o (one released language model has none).
        bias: of all projections.
    """

    kind: Literal["cosformer"] = "cosformer"
    heads: int = Field(ge=1)
    max_positions: int = Field(ge=1)
    out_proj: bool = True
    bias: bool = True

    def build(
        self, model_dim: int, layer_index: int, num_layers: int, *, causal: bool
    ) -> "Cosformer":
        return Cosformer(self, model_dim, causal=causal)


class Cosformer(TokenMixer):
    """cosFormer (Qin et al. 2022, arXiv:2202.08791, section 3.2).

    o_i = sum_j w_ij v_j / max(sum_j w_ij, 1e-6),  w_ij = relu(q_i) . relu(k_j) cos(pi (i-j) / 2M),
    over j <= i, or all j without ``causal``. By cos(a - b) = cos a cos b + sin a sin b this is
    linear attention with the features [x cos; x sin]; its values have a column of ones behind them,
    whose result is the denominator. Angles, sums and the division are float32 (float64 for a
    float64 model); features and the results of the sums are rounded to the activations' dtype. The
    state is [rows, heads, 2 head_dim, head_dim + 4].
    """

    def __init__(self, config: CosformerConfig, model_dim: int, *, causal: bool) -> None:
        super().__init__()
        if model_dim % config.heads:
            raise ValueError(f"heads is {config.heads}; expected a divisor of {model_dim}")
        self.config = config
        self.head_dim = model_dim // config.heads
        self.qkv_proj = nn.Linear(model_dim, 3 * model_dim, bias=config.bias)
        self.core = LinearAttentionCore(causal=causal)
        self.out_proj = (
            nn.Linear(model_dim, model_dim, bias=config.bias) if config.out_proj else nn.Identity()
        )

    def _features(self, x: Tensor, angles: Tensor) -> Tensor:
        y = F.relu(x).to(angles.dtype)
        return torch.cat([y * angles.cos(), y * angles.sin()], -1).to(x.dtype)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        state: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
        shared: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``TokenMixer.forward``.

        Raises:
            ValueError: a position of max_positions or more, where weights would turn negative. Seen
                on a CPU in eager mode; elsewhere where a row is longer than that.
        """
        most = self.config.max_positions
        if mask is None and cu_seqlens is None and x.shape[1] > most:
            raise ValueError(
                f"seq is {x.shape[1]}; expected at most max_positions, which is {most}; weights "
                "beyond it are negative"
            )
        if values_are_visible(positions) and int(positions.max()) >= most:
            raise ValueError(
                f"positions reach {int(positions.max())}; expected less than max_positions, which "
                f"is {most}; weights beyond it are negative"
            )
        parts = self.qkv_proj(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        dtype = accumulation_dtype(q.dtype)
        angles = (positions.to(torch.float64) * (math.pi / (2 * most))).to(dtype)[..., None, None]
        o, state = self.core(
            self._features(q, angles),
            self._features(k, angles),
            F.pad(v, (0, _ONES), value=1.0),
            None,
            state=state,
            cu_seqlens=cu_seqlens,
            mask=mask,
        )
        o, denominator = o.to(dtype).split([self.head_dim, _ONES], -1)
        o = (o / denominator[..., :1].clamp(min=_LEAST)).to(v.dtype)
        return self.out_proj(o.flatten(2)), state

    def mixing_flops(self, context: int) -> float:
        dims = (2 * self.head_dim, self.head_dim + _ONES)
        return self.core.flops_per_token(self.config.heads, *dims, context)

    def empty_state(
        self,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        shape = (rows, self.config.heads, 2 * self.head_dim, self.head_dim + _ONES)
        return zeros(*shape, dtype=dtype, device=device)
