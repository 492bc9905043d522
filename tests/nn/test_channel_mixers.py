"""Channel mixers against their formulas."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from transnormer.nn.activations import activation
from transnormer.nn.channel_mixers import FfnConfig, GluConfig


def test_simple_glu_has_no_activation() -> None:
    glu = GluConfig(hidden_dim=40).build(16).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    weights = (glu.gate_proj.weight, glu.up_proj.weight, glu.down_proj.weight)
    assert_close(glu(x), oracles.sglu(x, *weights))
    assert all(layer.bias is None for layer in (glu.gate_proj, glu.up_proj, glu.down_proj))


def test_activation_is_on_the_gate_branch() -> None:
    glu = GluConfig(hidden_dim=40, activation="silu").build(16).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    gate, up = x @ glu.gate_proj.weight.T, x @ glu.up_proj.weight.T
    assert_close(glu(x), (F.silu(gate) * up) @ glu.down_proj.weight.T)


def test_ffn_is_two_layers() -> None:
    ffn = FfnConfig(hidden_dim=40, activation="relu", bias=True).build(16).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    hidden = (x @ ffn.up_proj.weight.T + ffn.up_proj.bias).relu()
    assert_close(ffn(x), hidden @ ffn.down_proj.weight.T + ffn.down_proj.bias)


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("none", lambda x: x),
        ("silu", lambda x: x * torch.sigmoid(x)),
        ("1+elu", lambda x: torch.where(x > 0, x + 1, x.exp())),
        ("elu", lambda x: torch.where(x > 0, x, x.exp() - 1)),
        ("relu", lambda x: x.clamp(min=0)),
        ("sigmoid", lambda x: 1 / (1 + (-x).exp())),
    ],
)
def test_activations_by_name(name: str, exact) -> None:
    x = torch.randn(100, dtype=torch.float64)
    assert_close(activation(name)(x), exact(x))
