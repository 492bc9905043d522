"""Norms: the formula, the precision they compute in, groups and variants."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from transnormer.nn.norms import NormConfig


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_srms_matches_the_formula(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 7, 40) * 3).to(dtype)
    y = NormConfig().build(40)(x)
    assert y.dtype == dtype
    assert_close(y, oracles.srms_norm(x))


def test_srms_has_no_parameters() -> None:
    assert list(NormConfig().build(40).parameters()) == []


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_half_precision_neither_overflows_nor_vanishes(scale: float) -> None:
    # The mean square of 1e4 overflows float16, that of 1e-4 is below its eps.
    x = (torch.randn(5, 64) * scale).half()
    assert_close(NormConfig().build(64)(x), oracles.srms_norm(x))


def test_zeros_stay_zeros() -> None:
    assert bool((NormConfig().build(8)(torch.zeros(2, 8)) == 0).all())


def test_rms_has_a_weight() -> None:
    norm = NormConfig(kind="rms").build(40)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 40)
    assert_close(norm(x), oracles.srms_norm(x) * norm.weight.double())


def test_scale_norm_has_one_weight() -> None:
    norm = NormConfig(kind="scale", eps=1e-5).build(40)
    torch.nn.init.constant_(norm.weight, 1.5)
    x = torch.randn(3, 40)
    assert norm.weight.shape == (1,)
    assert_close(norm(x), oracles.srms_norm(x, 1e-5) * 1.5)


def test_layer_norm_is_torchs() -> None:
    norm = NormConfig(kind="layer", eps=1e-5).build(40)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 40)
    exact = F.layer_norm(x.double(), (40,), norm.weight.double(), norm.bias.double(), 1e-5)
    assert_close(norm(x), exact)


def test_groups_have_a_mean_each() -> None:
    x = torch.randn(3, 40)
    x[:, :10] *= 100
    grouped = NormConfig(groups=4).build(40)(x)
    exact = oracles.srms_norm(x.unflatten(-1, (4, 10))).flatten(-2)
    assert_close(grouped, exact)


def test_eps_outside_is_added_to_the_root() -> None:
    x = torch.randn(3, 40) * 1e-3
    norm = NormConfig(eps=1e-3, eps_outside=True).build(40)
    root = x.double().square().mean(-1, keepdim=True).sqrt()
    assert_close(norm(x), x.double() / (root + 1e-3))


def test_zeros_have_a_finite_gradient_where_eps_is_outside() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    NormConfig(eps=1e-8, eps_outside=True).build(8)(x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


def test_groups_must_divide() -> None:
    with pytest.raises(ValueError, match=r"groups is 3.*divisor of 40"):
        NormConfig(groups=3).build(40)


@pytest.mark.parametrize("kind", ["srms", "rms", "layer", "scale"])
def test_gradients(kind: str) -> None:
    norm = NormConfig(kind=kind).build(6).double()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)
