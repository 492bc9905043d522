"""Gated linear unit: the channel mixer of TransNormerLLM and of most of its relatives."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from transnormer.config import Config
from transnormer.nn.activations import Activation, activation


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
        self.activation = activation(config.activation)
        self.gate_proj = nn.Linear(model_dim, config.hidden_dim, bias=config.bias)
        self.up_proj = nn.Linear(model_dim, config.hidden_dim, bias=config.bias)
        self.down_proj = nn.Linear(config.hidden_dim, model_dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
