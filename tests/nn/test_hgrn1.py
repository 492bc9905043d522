"""HGRN against its formula in complex numbers."""

import oracles_recurrent as oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import srms_norm
from tolerances import GRADIENT, assert_close
from torch import Tensor

from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import Hgrn1Config

DIM, LAYERS, SRMS = 12, 3, NormConfig()


def build(layer_index: int = 1, *, causal: bool = True, **changes: object):
    """A float64 mixer without biases, and the lower bounds away from their start."""
    config = Hgrn1Config(**({"bias": False} | changes))
    mixer = config.build(DIM, layer_index, LAYERS, causal=causal).double()
    shared = config.build_shared(DIM, LAYERS)
    if shared is None:
        return mixer, None
    torch.nn.init.normal_(shared.double().gamma)
    return mixer, shared()


def run(mixer, x: Tensor, shared, **options: object):
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    return mixer(x, positions=positions, shared=shared, **options)


def merged(h: Tensor) -> Tensor:
    return torch.cat([h.real, h.imag], -1)


@pytest.mark.parametrize("layer_index", range(LAYERS))
def test_matches_the_formula(layer_index: int) -> None:
    mixer, shared = build(layer_index)
    x, state = torch.randn(2, 70, DIM).double(), torch.randn(2, DIM, 2).double()
    y, after = run(mixer, x, shared, state=state)
    weights = mixer.state_dict()
    h, exact_after = oracles.hgrn1(x, weights, shared[layer_index], torch.view_as_complex(state))
    gate = F.silu(x @ mixer.gate_proj.weight.T)
    normed = F.layer_norm(merged(h), (2 * DIM,), eps=1e-5)
    assert_close(y, (normed * gate) @ mixer.out_proj.weight.T)
    assert_close(after, torch.view_as_real(exact_after))
    assert after.shape == mixer.empty_state(2).shape


def test_gradients_of_all_parameters_match_the_formula() -> None:
    mixer, shared = build()
    shared = shared.detach()
    x = torch.randn(1, 40, DIM).double()
    weights = dict(mixer.named_parameters())
    names = ["input_proj.weight", "forget_proj.weight", "phase.theta"]
    run(mixer, x, shared)[0].square().sum().backward()
    copies = {k: v.detach().clone().requires_grad_() for k, v in weights.items()}
    h, _ = oracles.hgrn1(x, copies, shared[1], torch.zeros(1, DIM, dtype=torch.complex128))
    gate = F.silu(x @ copies["gate_proj.weight"].T)
    normed = F.layer_norm(merged(h), (2 * DIM,), eps=1e-5)
    ((normed * gate) @ copies["out_proj.weight"].T).square().sum().backward()
    for name in names:
        limit = GRADIENT[torch.float64]
        assert_close(weights[name].grad, copies[name].grad, limit=limit, name=name)


def test_gate_forms() -> None:
    x = torch.randn(1, 20, DIM).double()
    start = torch.zeros(1, DIM, dtype=torch.complex128)
    mixer, shared = build(norm=SRMS, gate_activation="sigmoid", gate_position="before_norm")
    h, _ = oracles.hgrn1(x, mixer.state_dict(), shared[1], start)
    gate = (x @ mixer.gate_proj.weight.T).sigmoid()
    exact = srms_norm(merged(h) * gate) @ mixer.out_proj.weight.T
    assert_close(run(mixer, x, shared)[0], exact)
    after, _ = build(norm=SRMS, gate_activation="sigmoid")
    after.load_state_dict(mixer.state_dict())
    exact = (srms_norm(merged(h)) * gate) @ mixer.out_proj.weight.T
    assert_close(run(after, x, shared)[0], exact)


def test_both_directions_count_the_token_itself_twice() -> None:
    mixer, shared = build(causal=False, norm=SRMS)
    x = torch.randn(2, 30, DIM).double()
    y, state = run(mixer, x, shared)
    assert state is None
    start = torch.zeros(2, DIM, dtype=torch.complex128)
    h, _ = oracles.hgrn1(x, mixer.state_dict(), shared[1], start, both_ways=True)
    gate = F.silu(x @ mixer.gate_proj.weight.T)
    assert_close(y, (srms_norm(merged(h)) * gate) @ mixer.out_proj.weight.T)


def test_without_lower_bounds_and_with_biases() -> None:
    mixer, shared = build(lower_bound="none", bias=True, norm=SRMS)
    assert shared is None
    for name in ("input_proj", "forget_proj", "gate_proj"):
        torch.nn.init.zeros_(getattr(mixer, name).bias)
    x = torch.randn(1, 20, DIM).double()
    start = torch.zeros(1, DIM, dtype=torch.complex128)
    h, _ = oracles.hgrn1(x, mixer.state_dict(), 0.0, start)
    gate = F.silu(x @ mixer.gate_proj.weight.T)
    exact = (srms_norm(merged(h)) * gate) @ mixer.out_proj.weight.T + mixer.out_proj.bias
    assert_close(run(mixer, x, None)[0], exact)


def test_the_phase_starts_as_rotary_frequencies_and_is_never_rounded() -> None:
    mixer, _ = build()
    exact = 10_000.0 ** (-2.0 * torch.arange(DIM, dtype=torch.float64) / DIM)
    assert_close(mixer.phase.theta.float(), exact)
    half = Hgrn1Config().build(DIM, 0, 1, causal=True).bfloat16()
    assert half.phase.theta.dtype == torch.float32
    assert_close(half.phase.theta, exact)
    assert half.input_proj.weight.dtype == torch.bfloat16


def test_positions_play_no_part() -> None:
    mixer, shared = build()
    x = torch.randn(1, 9, DIM).double()
    far = mixer(x, positions=torch.arange(9)[None] * 1000 + 7, shared=shared)[0]
    assert torch.equal(far, run(mixer, x, shared)[0])
