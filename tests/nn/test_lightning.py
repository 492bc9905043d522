"""The token mixer of TransNormerLLM against its formula, part by part."""

import oracles
import pytest
import torch
from tolerances import assert_close

from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import LightningConfig

DIM, HEADS, LAYERS = 32, 4, 3


def build(layer_index: int = 0, dtype: torch.dtype = torch.float64, **changes: object):
    mixer = LightningConfig(heads=HEADS, **changes).build(DIM, layer_index, LAYERS, causal=True)
    return mixer.to(dtype)


def run(mixer, x: torch.Tensor, state: torch.Tensor | None = None, start: int = 0):
    positions = torch.arange(start, start + x.shape[1]).expand(x.shape[:2])
    return mixer(x, positions=positions, cu_seqlens=None, mask=None, state=state)


@pytest.mark.parametrize("lrpe", [True, False], ids=["lrpe", "plain"])
@pytest.mark.parametrize("layer_index", range(LAYERS))
def test_released_form_matches_the_formula(layer_index: int, lrpe: bool) -> None:
    mixer = build(layer_index, lrpe=lrpe)
    x = torch.randn(2, 70, DIM, dtype=torch.float64)
    y, state = run(mixer, x)
    exact, exact_state = oracles.gla_block(
        x,
        mixer.qkvu_proj.weight,
        mixer.out_proj.weight,
        HEADS,
        oracles.tnl_log_decay(HEADS, layer_index, LAYERS),
        mixer.lrpe.theta if lrpe else None,
        torch.arange(70).expand(2, -1),
    )
    assert_close(y, exact)
    assert_close(state, exact_state)
    assert state.shape == mixer.empty_state(2).shape


def test_state_is_float32_under_bfloat16_weights() -> None:
    mixer = build(dtype=torch.bfloat16, lrpe=True)
    y, state = run(mixer, torch.randn(1, 10, DIM).bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_casts_do_not_round_the_decays(dtype: torch.dtype) -> None:
    exact = oracles.tnl_log_decay(HEADS, 2, LAYERS)
    mixer = build(2, dtype=dtype)
    assert torch.equal(mixer.decay(dtype), exact.float())
    assert_close(mixer.double().decay(torch.float64), exact)


def test_mask_leaves_no_trace_of_a_token() -> None:
    mixer = build(lrpe=True)
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[:, 5:9] = False
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    y, state = mixer(x, positions=positions, cu_seqlens=None, mask=mask, state=None)
    exact, exact_state = run(mixer, x[mask][None])
    assert_close(y[mask][None], exact)
    assert_close(state, exact_state)


def test_gate_forms() -> None:
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    full = build(gate_activation="sigmoid")
    q, k, v, u = (x @ full.qkvu_proj.weight.T).chunk(4, -1)
    silu = torch.nn.functional.silu
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (silu(q), silu(k), v))
    o, _ = oracles.linear_attention(q, k, v, oracles.tnl_log_decay(HEADS, 0, LAYERS))
    after = (oracles.srms_norm(o.flatten(2)) * u.sigmoid()) @ full.out_proj.weight.T
    assert_close(run(full, x)[0], after)
    before = build(gate_activation="sigmoid", gate_position="before_norm")
    before.load_state_dict(full.state_dict())
    exact = oracles.srms_norm(o.flatten(2) * u.sigmoid()) @ full.out_proj.weight.T
    assert_close(run(before, x)[0], exact)
    low = build(gate="low_rank", gate_rank=4, gate_activation="sigmoid")
    assert low.gate_down_proj.weight.shape == (4, DIM)
    assert low.gate_up_proj.weight.shape == (DIM, 4)
    assert run(low, x)[0].shape == x.shape
    none = build(gate="none")
    assert none.qkvu_proj.weight.shape == (3 * DIM, DIM)


def test_no_decay_sums_everything() -> None:
    mixer = build(decay="none", gate="none", qk_activation="none")
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    q, k, v = (x @ mixer.qkvu_proj.weight.T).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (q, k, v))
    o, _ = oracles.linear_attention(q, k, v)
    exact = oracles.srms_norm(o.flatten(2)) @ mixer.out_proj.weight.T
    assert_close(run(mixer, x)[0], exact)


def test_norm_groups_are_heads_on_request() -> None:
    mixer = build(norm=NormConfig(groups=HEADS), gate="none")
    reference = build(gate="none")
    reference.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    assert not torch.allclose(run(mixer, x)[0], run(reference, x)[0])


def test_bidirectional_sums_both_sides_once() -> None:
    mixer = LightningConfig(heads=HEADS, gate="none").build(DIM, 0, LAYERS, causal=False).double()
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    y, state = run(mixer, x)
    assert state is None
    silu = torch.nn.functional.silu
    q, k, v = (x @ mixer.qkvu_proj.weight.T).chunk(3, -1)
    q, k, v = (z.unflatten(-1, (HEADS, -1)) for z in (silu(q), silu(k), v))
    distance = (torch.arange(20)[:, None] - torch.arange(20)).abs()
    slopes = oracles.tnl_log_decay(HEADS, 0, LAYERS)[:, None, None]
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (slopes * distance).exp()
    o = torch.einsum("bhts,bshv->bthv", scores, v).flatten(2)
    assert_close(y, oracles.srms_norm(o) @ mixer.out_proj.weight.T)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"heads is 5.*divisor of 32"):
        LightningConfig(heads=5).build(DIM, 0, 1, causal=True)
