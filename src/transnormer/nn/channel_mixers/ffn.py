"""Plain feed-forward network of two layers."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from transnormer.config import Config
from transnormer.nn.activations import Activation, activation


class FfnConfig(Config):
    """y = act(x W_up) W_down.

    Attributes:
        hidden_dim: inner width.
        activation: between the layers.
        bias: of both projections.
    """

    kind: Literal["ffn"] = "ffn"
    hidden_dim: int = Field(ge=1)
    activation: Activation = "gelu"
    bias: bool = False

    def build(self, model_dim: int) -> "Ffn":
        return Ffn(self, model_dim)


class Ffn(nn.Module):
    """Two-layer feed-forward network, [..., model_dim] -> [..., model_dim]."""

    def __init__(self, config: FfnConfig, model_dim: int) -> None:
        super().__init__()
        self.activation = activation(config.activation)
        self.up_proj = nn.Linear(model_dim, config.hidden_dim, bias=config.bias)
        self.down_proj = nn.Linear(config.hidden_dim, model_dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))
