"""Bounded forget gates keep their precision at both ends, in PyTorch and in the kernels."""

import pytest
import torch
from kernel_cases import needs_interpreter
from ops.gates.gate_cases import both, weighted
from tolerances import EPS, FORGET_GATE, GATE_GRADIENT, assert_close
from torch import Tensor

from transnormer.ops.gates import forget_gate


@both
@pytest.mark.parametrize("bound", [None, 0.0, 1e-30, 0.3, 0.99, 0.999999], ids=str)
def test_gates_keep_their_relative_precision(bound: float | None, implementation: str) -> None:
    # Within what float32 holds at full precision: (1 - bound) exp(-z) above 1e-38.
    z = torch.linspace(-80, 70, 2001).view(-1, 23)
    row = None if bound is None else torch.full((23,), bound)
    log_gate, taken = forget_gate(z, row, implementation=implementation)
    low = 0.0 if row is None else row.double()
    e = torch.exp(-z.double())
    # 1 - f and f without cancellation: f = (1 + b e^-z) / (1 + e^-z).
    exact_taken = (1 - low) * e / (1 + e)
    forgotten = exact_taken < 0.5
    exact_log = torch.where(forgotten, torch.log1p(-exact_taken), ((1 + low * e) / (1 + e)).log())
    for actual, exact in ((log_gate, exact_log), (taken, exact_taken)):
        assert bool(((actual.double() / exact - 1).abs() <= FORGET_GATE).all())
    assert bool((log_gate <= 0).all())


@both
def test_gates_of_half_precision_are_float32(implementation: str) -> None:
    z = torch.randn(4, 5).bfloat16()
    log_gate, taken = forget_gate(z, torch.zeros(5), implementation=implementation)
    assert log_gate.dtype == taken.dtype == torch.float32
    _, taken = forget_gate(z, None, dtype=torch.bfloat16, implementation=implementation)
    assert taken.dtype == torch.bfloat16
    assert forget_gate(z.double(), torch.zeros(5))[0].dtype == torch.float64


@both
def test_a_zero_bound_has_finite_gradients_and_the_value_of_none(implementation: str) -> None:
    z = torch.tensor([-300.0, -90.0, -1.0, 0.0, 1.0, 80.0, 300.0])[:, None].requires_grad_()
    bound = torch.zeros(1, requires_grad=True)
    results = forget_gate(z, bound, implementation=implementation)
    for actual, exact in zip(results, forget_gate(z.double(), None)):
        assert_close(actual, exact)
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


def gradients(z: Tensor, bound: Tensor, implementation: str) -> tuple[Tensor, ...]:
    """Results and gradients; the gate is the last third of a projection, as in HGRN2."""
    x, bound = z.clone().requires_grad_(), bound.clone().requires_grad_()
    results = forget_gate(x.chunk(3, -1)[2], bound, dtype=z.dtype, implementation=implementation)
    return *results, *torch.autograd.grad(weighted(results), (x, bound))


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 300), (70, 40)], ids=str)
def test_kernel_gradients_match_float64(rows: int, width: int, dtype: torch.dtype) -> None:
    z, bound = (6.0 * torch.randn(2, rows, 3 * width)).to(dtype), torch.rand(width)
    bound[:4] = torch.tensor([1e-30, 0.5, 0.999, 1.0 - EPS[torch.float32]])
    exact = gradients(z.double(), bound.double(), "torch")
    actual = gradients(z, bound, "triton")
    limits = (FORGET_GATE, EPS[dtype], GATE_GRADIENT[dtype], GATE_GRADIENT[torch.float32])
    for name, x, y, limit in zip(("log f", "1 - f", "dz", "d bound"), actual, exact, limits):
        assert_close(x, y, limit=limit, name=name)


@needs_interpreter
def test_kernels_pass_what_is_no_number_and_take_infinities() -> None:
    z = torch.tensor([float("nan"), float("inf"), -float("inf")])[:, None]
    for bound in (None, torch.zeros(1), torch.full((1,), 0.5)):
        log_gate, taken = (x.flatten() for x in forget_gate(z, bound, implementation="triton"))
        assert bool(log_gate[0].isnan() & taken[0].isnan())
        assert log_gate[1] == taken[1] == 0.0
        low = 0.0 if bound is None else bound.item()
        assert log_gate[2].exp() == low
        assert taken[2] == 1.0 - low


@needs_interpreter
def test_the_library_ops_pass_opcheck() -> None:
    z = torch.randn(2, 3, 5, requires_grad=True)
    bound = torch.rand(5, requires_grad=True)
    op = torch.ops.transnormer.forget_gate.default
    torch.library.opcheck(op, (z, bound, torch.float32))
    torch.library.opcheck(op, (z, None, torch.bfloat16))
    grad = torch.autograd.grad(op(z, bound, z.dtype)[0].sum(), z, create_graph=True)[0].sum()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad, z)


@needs_interpreter
def test_no_tokens_have_no_gates() -> None:
    z, bound = torch.zeros(2, 0, 5, requires_grad=True), torch.rand(5, requires_grad=True)
    results = forget_gate(z, bound, implementation="triton")
    assert all(x.shape == z.shape for x in results)
    assert torch.equal(torch.autograd.grad(weighted(results), bound)[0], torch.zeros(5))


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"z": [0.0]}, TypeError, "z is list"),
        ({"z": torch.zeros(2, 5).long()}, TypeError, "z is torch.int64"),
        ({"z": torch.zeros(()), "bound": None}, ValueError, r"z has shape \[\]"),
        ({"bound": torch.zeros(4)}, ValueError, "bound has shape"),
        ({"bound": torch.ones(5)}, ValueError, "bound holds 1.0 to 1.0; expected 0 <= bound < 1"),
        ({"bound": torch.full((5,), -0.1)}, ValueError, "bound holds -0.1"),
        ({"dtype": torch.int64}, TypeError, "dtype is torch.int64"),
        ({"implementation": "none"}, ValueError, "implementation of forget_gate is 'none'"),
        ({"z": torch.zeros(2, 5).double(), "implementation": "triton"}, NotImplementedError, "64"),
    ],
)
def test_wrong_inputs_are_refused(changes: dict, error: type[Exception], named: str) -> None:
    given = {"z": torch.zeros(2, 5), "bound": torch.zeros(5)} | changes
    with pytest.raises(error, match=named):
        forget_gate(given.pop("z"), given.pop("bound"), **given)
