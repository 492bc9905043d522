"""HGRN2 against its formula, in both directions and with every switch."""

import oracles_recurrent as oracles
import pytest
import torch
from oracles import srms_norm
from tolerances import assert_close

from transnormer.nn.lower_bounds import LowerBounds
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import Hgrn2Config

DIM, HEAD_DIM, LAYERS = 24, 8, 3


def build(layer_index: int = 1, *, causal: bool = True, **changes: object):
    """A float64 mixer, and the lower bounds of all layers away from their start."""
    config = Hgrn2Config(**({"head_dim": HEAD_DIM} | changes))
    mixer = config.build(DIM, layer_index, LAYERS, causal=causal).double()
    shared = config.build_shared(DIM, LAYERS)
    if shared is None:
        return mixer, None
    torch.nn.init.normal_(shared.double().gamma)
    return mixer, shared()


def run(mixer, x: torch.Tensor, shared, **options: object):
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    return mixer(x, positions=positions, shared=shared, **options)


@pytest.mark.parametrize("layer_index", range(LAYERS))
@pytest.mark.parametrize("head_dim", [4, 8, 24])
def test_matches_the_formula(layer_index: int, head_dim: int) -> None:
    mixer, shared = build(layer_index, head_dim=head_dim)
    x = torch.randn(2, 70, DIM, dtype=torch.float64)
    y, state = run(mixer, x, shared)
    o = oracles.hgrn2(x, mixer.state_dict(), shared[layer_index], head_dim)
    assert_close(y, srms_norm(o) @ mixer.out_proj.weight.T)
    assert state.shape == mixer.empty_state(2).shape == (2, DIM // head_dim, head_dim, head_dim)


@pytest.mark.parametrize("q_activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("v_activation", ["none", "silu"])
def test_activations(q_activation: str, v_activation: str) -> None:
    mixer, shared = build(q_activation=q_activation, v_activation=v_activation)
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    o = oracles.hgrn2(x, mixer.state_dict(), shared[1], HEAD_DIM, q_activation, v_activation)
    assert_close(run(mixer, x, shared)[0], srms_norm(o) @ mixer.out_proj.weight.T)


def test_norm_groups_and_bias() -> None:
    mixer, shared = build(norm=NormConfig(groups=DIM // HEAD_DIM), bias=True)
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    torch.nn.init.zeros_(mixer.in_proj.bias)
    o = oracles.hgrn2(x, mixer.state_dict(), shared[1], HEAD_DIM)
    o = srms_norm(o.unflatten(-1, (-1, HEAD_DIM))).flatten(2)
    assert_close(run(mixer, x, shared)[0], o @ mixer.out_proj.weight.T + mixer.out_proj.bias)


def test_without_lower_bounds() -> None:
    mixer, shared = build(lower_bound="none")
    assert shared is None
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    o = oracles.hgrn2(x, mixer.state_dict(), 0.0, HEAD_DIM)
    assert_close(run(mixer, x, None)[0], srms_norm(o) @ mixer.out_proj.weight.T)


@pytest.mark.parametrize("rule", ["cumulative", "exclusive"])
def test_the_shared_part_follows_the_rule(rule: str) -> None:
    shared = Hgrn2Config(head_dim=HEAD_DIM, lower_bound=rule).build_shared(DIM, LAYERS)
    assert isinstance(shared, LowerBounds)
    assert shared.rule == rule
    assert shared.gamma.shape == (LAYERS, DIM)


def test_both_directions_count_the_token_itself_twice() -> None:
    mixer, shared = build(causal=False)
    x = torch.randn(2, 30, DIM, dtype=torch.float64)
    y, state = run(mixer, x, shared)
    assert state is None
    o = oracles.hgrn2(x, mixer.state_dict(), shared[1], HEAD_DIM, both_ways=True)
    assert_close(y, srms_norm(o) @ mixer.out_proj.weight.T)


def test_gates_that_forget_nothing_or_all_are_finite_in_float32() -> None:
    mixer, _ = build(lower_bound="none")
    mixer = mixer.float()
    x = torch.randn(1, 100, DIM, requires_grad=True)
    with torch.no_grad():
        mixer.in_proj.weight[2 * DIM :] *= 1000.0
    y, _ = run(mixer, x, None)
    y.square().sum().backward()
    assert bool(torch.isfinite(y).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in (x, *mixer.parameters()))


def test_head_dim_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"head_dim is 5.*24"):
        Hgrn2Config(head_dim=5).build(DIM, 0, 1, causal=True)


def test_bounds_that_were_not_given_are_named() -> None:
    mixer, _ = build()
    with pytest.raises(ValueError, match="shared is None"):
        run(mixer, torch.randn(1, 3, DIM, dtype=torch.float64), None)
