"""Norms over the last dim, computed in max(float32, input dtype) and cast back."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from transnormer.config import Config
from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.norm import rms_norm


class NormConfig(Config):
    """Which norm, and how.

    Attributes:
        kind: "srms" (no parameters; TransNormerLLM), "rms" (a weight), "layer" (weight, bias) or
            "scale" (one weight for all channels: Nguyen and Salazar 2019, arXiv:1910.05895, in
            units of sqrt(dim); FLASH has eps 1e-5).
        eps: added to the mean square (to the root where ``eps_outside``).
        eps_outside: x / (rms + eps), the form of the TransNormer T1 and T2 code.
        groups: the last dim is split into this many groups, each with its own mean.
    """

    kind: Literal["srms", "rms", "layer", "scale"] = "srms"
    eps: float = Field(default=1e-6, ge=0.0)
    eps_outside: bool = False
    groups: int = Field(default=1, ge=1)

    def build(self, dim: int) -> "Norm":
        return Norm(self, dim)


class Norm(nn.Module):
    """SRMSNorm, RMSNorm, LayerNorm or ScaleNorm over the last dim, in one or several groups.

    SRMSNorm(x) = x / sqrt(mean(x^2) + eps), without parameters (Qin et al. 2023, arXiv:2307.14995,
    section 3.1, whose formula has no eps; the released code has 1e-6 inside the root).
    """

    def __init__(self, config: NormConfig, dim: int) -> None:
        super().__init__()
        if dim % config.groups:
            raise ValueError(f"norm.groups is {config.groups}; expected a divisor of {dim}")
        self.config, self.dim = config, dim
        weights = {"srms": 0, "scale": 1}.get(config.kind, dim)
        self.weight = nn.Parameter(torch.ones(weights)) if weights else None
        self.bias = nn.Parameter(torch.zeros(dim)) if config.kind == "layer" else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, [..., dim]; the result has x's dtype."""
        config = self.config
        y = x.to(accumulation_dtype(x.dtype))
        if config.groups > 1:
            y = y.unflatten(-1, (config.groups, -1))
        if config.kind == "layer":
            y = y - y.mean(-1, keepdim=True)
        if config.eps_outside:
            # vector_norm has a gradient at 0, where that of the square root is infinite.
            root = torch.linalg.vector_norm(y, dim=-1, keepdim=True) * y.shape[-1] ** -0.5
            y = y / (root + config.eps)
        else:
            y = rms_norm(y, config.eps)
        if config.groups > 1:
            y = y.flatten(-2)
        if self.weight is not None:
            y = y * self.weight.to(y.dtype)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.config.kind}, dim={self.dim}, eps={self.config.eps}"
