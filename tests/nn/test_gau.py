"""The gated attention unit in both forms against its formula."""

import oracles_transnormer as oracles
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor

from transnormer.nn.token_mixers import GauConfig

DIM, CHUNK = 8, 4


def build(causal: bool = True, **changes: object):
    fields = {"chunk_size": CHUNK, "key_dim": 6, "hidden_dim": 12} | changes
    mixer = GauConfig(**fields).build(DIM, 0, 2, causal=causal).double()
    with torch.no_grad():
        for x in mixer.parameters():
            x.copy_(torch.randn(x.shape))
    return mixer


def run(mixer, x: Tensor):
    return mixer(x, positions=torch.arange(x.shape[1]).expand(x.shape[:2]))


def exact(mixer, x: Tensor, divisor: int, *, causal: bool) -> Tensor:
    config = mixer.config
    bias = {"chunk_size": config.chunk_size, "distance_bias": getattr(mixer, "distance_bias", None)}
    if config.form == "quad":
        bias = {"rotary_bias": mixer.rotary_bias}
    u, v, z = F.silu(mixer.uvz_proj(x)).split([mixer.hidden_dim] * 2 + [config.key_dim], -1)
    o = [
        oracles.flash(
            z[row],
            v[row],
            mixer.scales,
            mixer.offsets,
            mixer.rotary.theta,
            divisor,
            causal=causal,
            **bias,
        )
        for row in range(x.shape[0])
    ]
    return mixer.out_proj(u * torch.stack(o))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
@pytest.mark.parametrize(
    ("form", "divisor", "used"),
    [("linear", None, CHUNK), ("linear", 7, 7), ("quad", None, 512), ("quad", 7, 7)],
)
def test_forms_match_the_formula(form: str, divisor: int | None, used: int, causal: bool) -> None:
    mixer = build(causal, form=form, divisor=divisor)
    x = torch.randn(2, 11, DIM, dtype=torch.float64)
    with torch.no_grad():
        assert_close(run(mixer, x)[0], exact(mixer, x, used, causal=causal))


def test_wide_values_are_split_into_groups_without_a_change() -> None:
    mixer = build(hidden_dim=516)
    assert mixer.groups == 3
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    with torch.no_grad():
        y, state = run(mixer, x)
        assert_close(y, exact(mixer, x, CHUNK, causal=True))
    assert state.sums.shape == (1, 3, 6, 172)


def test_the_linear_forms_state_has_constant_size_and_float32_sums() -> None:
    mixer = build().to(torch.bfloat16)
    for seq in (1, 4, 11):
        _, state = run(mixer, torch.randn(2, seq, DIM).bfloat16())
        assert [x.shape for x in state] == [x.shape for x in mixer.empty_state(2)]
        assert state.sums.dtype == torch.float32
        assert state.keys.dtype == torch.bfloat16
        assert state.valid.sum(1).tolist() == [seq % CHUNK] * 2


def test_the_quadratic_forms_state_grows() -> None:
    _, state = run(build(form="quad"), torch.randn(2, 11, DIM, dtype=torch.float64))
    assert state.keys.shape == (2, 11, 1, 12)


def test_initial_values_are_the_released_codes() -> None:
    mixer = GauConfig().build(512, 0, 1, causal=True)
    assert 0.017 < mixer.scales.std() < 0.023
    assert 0.014 < mixer.distance_bias.std() < 0.026
    assert bool((mixer.offsets == 0).all())
    assert mixer.hidden_dim == 1024


def test_an_odd_key_dim_is_refused() -> None:
    with pytest.raises(ValueError, match=r"7.*even"):
        build(key_dim=7)
