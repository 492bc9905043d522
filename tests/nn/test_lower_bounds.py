"""Lower bounds rise from 0 with depth and stay below 1."""

import oracles_recurrent as oracles
import pytest
import torch
from tolerances import assert_close

from transnormer.nn.lower_bounds import LowerBounds, bound_of
from transnormer.ops.gates import forget_gate

RULES = ["cumulative", "exclusive"]


def make(rule: str, dtype: torch.dtype = torch.float64) -> LowerBounds:
    bounds = LowerBounds(6, 5, rule).to(dtype)
    torch.nn.init.normal_(bounds.gamma, std=2.0)
    return bounds


@pytest.mark.parametrize("rule", RULES)
def test_bounds_are_the_sums_of_the_rule(rule: str) -> None:
    bounds = make(rule)
    assert_close(bounds(), oracles.lower_bounds(bounds.gamma, rule))


@pytest.mark.parametrize("rule", RULES)
def test_bounds_are_zero_in_the_first_layer_and_rise_below_one(rule: str) -> None:
    bounds = make(rule)()
    assert bool((bounds[0] == 0).all())
    assert bool((bounds[1:] > bounds[:-1]).all())
    assert bool((bounds < 1).all())


def test_the_rules_agree_at_the_start_and_differ_later() -> None:
    starts = [LowerBounds(6, 5, rule) for rule in RULES]
    steps = torch.arange(6, dtype=torch.float64)[:, None].expand(6, 5) / 6
    for bounds in starts:
        assert_close(bounds(), steps)
    starts[1].load_state_dict(starts[0].state_dict())
    for bounds in starts:
        torch.nn.init.constant_(bounds.gamma[2], 3.0)
    assert not torch.allclose(starts[0](), starts[1]())


def test_one_layer_has_no_bound() -> None:
    for rule in RULES:
        assert torch.equal(LowerBounds(1, 5, rule)(), torch.zeros(1, 5))


@pytest.mark.parametrize("rule", RULES)
def test_bounds_that_round_to_one_stay_below_it(rule: str) -> None:
    bounds = LowerBounds(4, 1, rule)
    with torch.no_grad():
        bounds.gamma.copy_(torch.tensor([[-200.0], [200.0], [0.0], [0.0]]))
        if rule == "exclusive":
            bounds.gamma.copy_(bounds.gamma.roll(-1, 0))
    values = bounds()
    assert values.max() == 1 - torch.finfo(torch.float32).eps
    log_gate, taken = forget_gate(torch.randn(3, 1), values[-1])
    (log_gate.sum() + taken.sum()).backward()
    assert bool(torch.isfinite(bounds.gamma.grad).all())


def test_casts_do_not_round_the_bounds() -> None:
    bounds = make("cumulative", torch.float32)
    exact = bounds().detach()
    assert torch.equal(bounds.bfloat16()(), exact)
    assert bounds.gamma.dtype == torch.float32
    assert bounds.double()().dtype == torch.float64


def test_absent_bounds_are_named() -> None:
    assert bound_of(None, "none", 3) is None
    with pytest.raises(ValueError, match=r"shared is None.*build_shared"):
        bound_of(None, "cumulative", 0)
