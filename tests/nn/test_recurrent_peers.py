"""Mixers against the naive loops of flash-linear-attention, where it is installed."""

import pytest
import torch
import torch.nn.functional as F
from oracles import srms_norm
from tolerances import PEER_LOOP, assert_close

from transnormer.nn.lower_bounds import LowerBounds
from transnormer.nn.token_mixers import Hgrn1Config, Hgrn2Config, RetentionConfig

DIM, SEQ, LAYERS = 32, 100, 4
REASON = "flash-linear-attention is not installed; run: pip install 'transnormer[bench]'"


def bounds() -> torch.Tensor:
    shared = LowerBounds(LAYERS, DIM, "cumulative")
    torch.nn.init.normal_(shared.gamma)
    return shared().detach()


def bounds_of_peer(gamma: torch.Tensor) -> torch.Tensor:
    """As flash-linear-attention's HGRN2 makes them from its parameter."""
    shares = gamma.softmax(0, dtype=torch.float)
    return shares.cumsum(0) - shares[0]


@torch.no_grad()
@pytest.mark.parametrize("layer_index", [0, 2])
def test_hgrn2_is_gated_linear_attention_with_forgotten_keys(layer_index: int) -> None:
    naive = pytest.importorskip("fla.ops.gla.naive", reason=REASON)
    config, shared = Hgrn2Config(head_dim=8), bounds()
    mixer = config.build(DIM, layer_index, LAYERS, causal=True)
    x = torch.randn(2, SEQ, DIM)
    v, q, z = F.linear(x, mixer.in_proj.weight).chunk(3, -1)
    g = F.logsigmoid(z)
    if layer_index > 0:
        low = shared[layer_index]
        g = torch.logaddexp(low.log(), torch.log1p(-low) + g)
    heads = [y.unflatten(-1, (-1, 8)) for y in (F.silu(q), 1 - g.exp(), v, g)]
    # The naive form scales q by key_dim^-1/2.
    o, state = naive.naive_recurrent_gla(heads[0] * 8**0.5, *heads[1:], output_final_state=True)
    positions = torch.arange(SEQ).expand(2, -1)
    y, actual_state = mixer(x, positions=positions, shared=shared)
    exact = srms_norm(o.flatten(2)) @ mixer.out_proj.weight.double().T
    assert_close(y, exact, limit=PEER_LOOP)
    assert_close(actual_state, state, limit=PEER_LOOP)


@torch.no_grad()
def test_the_lower_bounds_are_those_of_the_peer() -> None:
    shared = LowerBounds(LAYERS, DIM, "cumulative")
    torch.nn.init.normal_(shared.gamma)
    assert_close(shared(), bounds_of_peer(shared.gamma).double(), limit=PEER_LOOP)


@torch.no_grad()
def test_retention_is_the_peer_s() -> None:
    naive = pytest.importorskip("fla.ops.retention.naive", reason=REASON)
    mixer = RetentionConfig(heads=4).build(DIM, 0, 1, causal=True)
    x, positions = torch.randn(2, SEQ, DIM), torch.arange(SEQ).expand(2, -1)
    q, k, v = (
        F.linear(x, getattr(mixer, f"{name}_proj").weight).unflatten(-1, (4, -1)) for name in "qkv"
    )
    q, k = mixer.rotary((q, k), positions)
    o = naive.naive_retention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)
    gate = F.silu(F.linear(x, mixer.gate_proj.weight)).double()
    exact = (gate * srms_norm(o).flatten(2)) @ mixer.out_proj.weight.double().T
    assert_close(mixer(x, positions=positions)[0], exact, limit=PEER_LOOP)


@torch.no_grad()
def test_hgrn_without_phase_is_the_peer_s_recurrence() -> None:
    naive = pytest.importorskip("fla.ops.hgrn.naive", reason=REASON)
    shared = bounds()
    mixer = Hgrn1Config(bias=False).build(DIM, 2, LAYERS, causal=True)
    mixer.phase.theta.zero_()
    x, positions = torch.randn(2, SEQ, DIM), torch.arange(SEQ).expand(2, -1)
    low = shared[2]
    g = torch.logaddexp(
        low.log(), torch.log1p(-low) + F.logsigmoid(F.linear(x, mixer.forget_proj.weight))
    )
    c = F.silu(F.linear(x, mixer.input_proj.weight)).unflatten(-1, (-1, 2))
    # The peer's state is real: the real and the imaginary part are two of them.
    parts = [naive.naive_recurrent_hgrn((1 - g.exp()) * c[..., i], g)[0] for i in (0, 1)]
    normed = F.layer_norm(torch.cat(parts, -1).double(), (2 * DIM,), eps=1e-5)
    gate = F.silu(F.linear(x, mixer.gate_proj.weight)).double()
    exact = (normed * gate) @ mixer.out_proj.weight.double().T
    assert_close(mixer(x, positions=positions, shared=shared)[0], exact, limit=PEER_LOOP)
