"""The running log-sum-exp against PyTorch's in float64: values, gradients, restarts, no mass."""

import math

import pytest
import torch
from tolerances import EPS, assert_close

from transnormer.ops.logcumsumexp import logcumsumexp


@pytest.mark.parametrize("seq", [1, 2, 3, 4, 5, 16, 17, 100])
def test_every_length_matches(seq: int) -> None:
    x = 30.0 * torch.randn(2, seq, 3, 4, dtype=torch.float64)
    assert_close(logcumsumexp(x), torch.logcumsumexp(x, 1))


@pytest.mark.parametrize("seq", [1, 2, 7, 17])
def test_gradient_is_that_of_the_values(seq: int) -> None:
    x = (3.0 * torch.randn(2, seq, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(logcumsumexp, (x,))


def test_restarts_begin_anew() -> None:
    bounds = [0, 1, 8, 9, 30, 41]
    x = torch.randn(1, 41, 3, dtype=torch.float64, requires_grad=True)
    starts = torch.zeros(41, dtype=torch.bool)
    starts[bounds[:-1]] = True
    parts = [torch.logcumsumexp(x[:, a:b], 1) for a, b in zip(bounds, bounds[1:])]
    exact = torch.cat(parts, 1)
    y = logcumsumexp(x, starts)
    assert_close(y, exact.detach())
    weight = torch.randn_like(exact)
    (wanted,) = torch.autograd.grad((exact * weight).sum(), x)
    (actual,) = torch.autograd.grad((y * weight).sum(), x)
    assert_close(actual, wanted, limit=1e-11)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_no_mass_is_exact_and_has_finite_gradients(packed: bool) -> None:
    x = torch.randn(1, 30, 2, dtype=torch.float64)
    x[:, :3] = x[:, 8] = x[:, 12:14] = -math.inf
    starts = None
    if packed:
        starts = torch.zeros(30, dtype=torch.bool)
        starts[[0, 8, 12]] = True
    x.requires_grad_()
    y = logcumsumexp(x, starts)
    assert y[:, :3].eq(-math.inf).all()
    assert y[:, 8].eq(-math.inf).all() == packed
    y.backward(torch.randn_like(y))
    assert x.grad.isfinite().all()
    assert x.grad[x == -math.inf].eq(0).all()


@pytest.mark.parametrize("offset", [0.0, 3000.0, -3000.0])
def test_any_range_of_values_is_summed(offset: float) -> None:
    x = offset + torch.tensor([-1e4, 0.0, 1e4, 1e4, -1e4], dtype=torch.float64)
    x = x[None, :, None].requires_grad_()
    y = logcumsumexp(x)
    twice = 1e4 + math.log(2.0)
    exact = offset + torch.tensor([-1e4, 0.0, 1e4, twice, twice], dtype=torch.float64)
    assert_close(y.flatten(), exact)
    y.sum().backward()
    # Each token's share of the sums from itself on: all of its own, or halves with its equal.
    wanted = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    assert_close(x.grad.flatten(), wanted, limit=1e-11)


def test_float32_is_rounded_once() -> None:
    x = torch.randn(1, 3000, 2)
    error = logcumsumexp(x).double() - torch.logcumsumexp(x.double(), 1)
    # log(3000) and a bit: below 16, where half a unit in the last place is 4 eps.
    assert error.abs().max() <= 4 * EPS[torch.float32] * (1 + 1e-6)


def test_op_keeps_the_rules_of_torch() -> None:
    x = torch.randn(2, 9, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.transnormer.logcumsumexp.default, (x, None))


def test_half_precision_is_refused() -> None:
    with pytest.raises(TypeError, match=r"x is torch.bfloat16.*float32"):
        logcumsumexp(torch.zeros(1, 2, 3).bfloat16())
