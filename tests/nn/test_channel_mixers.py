"""Channel mixers against their formulas."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import needs_interpreter
from tolerances import GRADIENT, assert_close
from torch import Tensor, nn

from transnormer.nn.activations import activation
from transnormer.nn.channel_mixers import FfnConfig, Glu, GluConfig, glu


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


def gradients(mixer: Glu, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), list(mixer.parameters())))


@needs_interpreter
@pytest.mark.parametrize("name", ["none", "silu"])
def test_one_projection_into_both_factors_is_the_same(name: str) -> None:
    mixer = GluConfig(hidden_dim=40, activation=name).build(16)
    x = torch.randn(2, 5, 16)
    found = mixer.joint_forward(x, "triton")
    exact = mixer.double()(x.double())
    expected = gradients(mixer, exact)
    assert_close(found, exact)
    for actual, wanted in zip(gradients(mixer.float(), mixer.joint_forward(x, "triton")), expected):
        assert_close(actual, wanted, limit=GRADIENT[torch.float32])


def products(mixer: Glu, x: Tensor) -> int:
    """Linear layers in the graph that torch.compile makes of a forward pass."""
    found = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        linears = [n for n in graph.graph.nodes if n.target in (F.linear, torch._C._nn.linear)]
        found.append(len(linears))
        return graph.forward

    torch._dynamo.reset()
    y = torch.compile(mixer, backend=backend, fullgraph=True)(x)
    assert_close(y, mixer.double()(x.double()))
    mixer.float()
    return sum(found)


def test_only_a_plain_mixer_that_is_trained_compiled_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(2, 5, 16)
    mixer = GluConfig(hidden_dim=40).build(16)
    assert products(mixer, x) == 3
    monkeypatch.setattr(glu, "why_not", lambda device: None)
    assert products(mixer, x) == 1
    with torch.no_grad():
        assert products(mixer, x) == 3
    assert products(GluConfig(hidden_dim=40, activation="gelu").build(16), x) == 3
    assert products(GluConfig(hidden_dim=40, bias=True).build(16), x) == 3

    class Shared(nn.Linear):
        pass

    mixer.down_proj.__class__ = Shared
    assert products(mixer, x) == 3
