"""Gated linear unit: the channel mixer of TransNormerLLM and of most of its relatives."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from transnormer.config import Config
from transnormer.nn.activations import Activation, activation
from transnormer.ops.checks import autocast_dtype
from transnormer.ops.glu import gated_projection
from transnormer.ops.kernel_devices import why_not


class GluConfig(Config):
    """y = (act(x W_gate) * (x W_up)) W_down.

    Attributes:
        hidden_dim: width of the gate and up projections.
        activation: "none" is TransNormerLLM's simple GLU (SGLU).
        bias: of all projections.
    """

    kind: Literal["glu"] = "glu"
    hidden_dim: int = Field(ge=1)
    activation: Activation = "none"
    bias: bool = False

    def build(self, model_dim: int) -> "Glu":
        return Glu(self, model_dim)


class Glu(nn.Module):
    """Gated linear unit, [..., model_dim] -> [..., model_dim] (Qin et al. 2023, section 3.1)."""

    def __init__(self, config: GluConfig, model_dim: int) -> None:
        super().__init__()
        self.config = config
        self.activation = activation(config.activation)
        self.gate_proj = nn.Linear(model_dim, config.hidden_dim, bias=config.bias)
        self.up_proj = nn.Linear(model_dim, config.hidden_dim, bias=config.bias)
        self.down_proj = nn.Linear(config.hidden_dim, model_dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self._is_joint(x):
            return self.joint_forward(x)
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))

    def _is_joint(self, x: Tensor) -> bool:
        """Whether to train with one product for both projections: compiled, on a GPU, unchanged."""
        # Uncompiled, putting the weights beside each other is a pass of its own over them.
        if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
            return False
        # Whoever cuts, quantises or adapts projections puts modules of its own there.
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if any(type(projection) is not nn.Linear for projection in projections):
            return False
        plain = self.config.activation in ("none", "silu") and not self.config.bias
        return plain and x.dtype != torch.float64 and why_not(x.device) is None

    def joint_forward(self, x: Tensor, implementation: str = "auto") -> Tensor:
        """The same by one projection into both factors and one op behind it; see ``ops.glu``."""
        dtype = autocast_dtype(x)
        weights = (self.gate_proj.weight.to(dtype), self.up_proj.weight.to(dtype))
        return gated_projection(
            F.linear(x.to(dtype), torch.cat(weights)),
            self.down_proj.weight.to(dtype),
            silu=self.config.activation == "silu",
            implementation=implementation,
        )
