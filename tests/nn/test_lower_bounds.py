"""Bounds rise from 0 with depth, and bounded gates keep their precision at both ends."""

import oracles_recurrent as oracles
import pytest
import torch
from tolerances import FORGET_GATE, assert_close

from transnormer.nn.lower_bounds import LowerBounds, bound_of, forget_gate

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


@pytest.mark.parametrize("bound", [None, 0.0, 1e-30, 0.3, 0.99, 0.999999], ids=str)
def test_gates_keep_their_relative_precision(bound: float | None) -> None:
    # Within what float32 holds at full precision: (1 - bound) exp(-z) above 1e-38.
    z = torch.linspace(-80, 70, 2001)
    row = None if bound is None else torch.tensor([bound])
    log_gate, taken = forget_gate(z[:, None], row)
    low = 0.0 if row is None else row.double()
    e = torch.exp(-z.double()[:, None])
    # 1 - f and f without cancellation: f = (1 + b e^-z) / (1 + e^-z).
    exact_taken = (1 - low) * e / (1 + e)
    forgotten = exact_taken < 0.5
    exact_log = torch.where(forgotten, torch.log1p(-exact_taken), ((1 + low * e) / (1 + e)).log())
    for actual, exact in ((log_gate, exact_log), (taken, exact_taken)):
        assert bool(((actual.double() / exact - 1).abs() <= FORGET_GATE).all())
    assert bool((log_gate <= 0).all())


def test_gates_of_half_precision_are_float32() -> None:
    z = torch.randn(4, 5).bfloat16()
    log_gate, taken = forget_gate(z, torch.zeros(5))
    assert log_gate.dtype == taken.dtype == torch.float32
    assert forget_gate(z.double(), torch.zeros(5))[0].dtype == torch.float64


def test_a_zero_bound_has_finite_gradients_and_the_value_of_none() -> None:
    z = torch.tensor([-300.0, -90.0, -1.0, 0.0, 1.0, 90.0, 300.0])[:, None].requires_grad_()
    bound = torch.zeros(1, requires_grad=True)
    results = forget_gate(z, bound)
    for actual, exact in zip(results, forget_gate(z, None)):
        assert_close(actual, exact.double())
    for grad in torch.autograd.grad(sum(x.sum() for x in results), (z, bound)):
        assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("bound", [0.0, 0.4])
def test_gradients_of_gates_are_right(bound: float) -> None:
    # At 1 - f = 1/2 the two formulas meet; finite differences across it are right too.
    z = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None].requires_grad_()
    if bound == 0.0:
        assert torch.autograd.gradcheck(lambda z: forget_gate(z, torch.zeros(1).double()), z)
        return
    row = torch.full((1,), bound, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forget_gate, (z, row))


def test_absent_bounds_are_named() -> None:
    assert bound_of(None, "none", 3) is None
    with pytest.raises(ValueError, match=r"shared is None.*build_shared"):
        bound_of(None, "cumulative", 0)
