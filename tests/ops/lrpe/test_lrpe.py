"""The kernels of cosine doubling against the formula in float64, at positions near and far."""

import pytest
import torch
from kernel_cases import laid_out, needs_interpreter
from ops.gates.gate_cases import weighted
from tolerances import EPS, GATE_GRADIENT, OUTPUT, assert_close
from torch import Tensor

from transnormer.ops.lrpe import lrpe

pytestmark = needs_interpreter
HEADS, DIM = 3, 20


def make(seq: int = 55, start: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two tensors, positions and frequencies, some of them beyond one turn a token."""
    x, y = torch.randn(2, 2, seq, HEADS, DIM)
    return x, y, torch.arange(start, start + seq).expand(2, -1), 8.0 * torch.rand(HEADS, DIM) - 4.0


def results(
    x: Tensor, y: Tensor, positions: Tensor, theta: Tensor, implementation: str
) -> tuple[Tensor, ...]:
    """Both outputs and the gradients of x, y and theta."""
    leaves = [z.detach().requires_grad_() for z in (x, y, theta)]
    found = lrpe((leaves[0], leaves[1]), positions, leaves[2], implementation=implementation)
    return *found, *torch.autograd.grad(weighted(found), leaves)


@pytest.mark.parametrize("start", [0, 4_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_float64(dtype: torch.dtype, start: int) -> None:
    x, y, positions, theta = make(start=start)
    x, y = x.to(dtype), y.to(dtype)
    exact = results(x.double(), y.double(), positions, theta.double(), "torch")
    actual = results(x, y, positions, theta, "triton")
    limits = [OUTPUT[dtype]] * 2 + [GATE_GRADIENT[dtype]] * 2 + [GATE_GRADIENT[torch.float32]]
    for name, a, b, limit in zip(("x", "y", "dx", "dy", "dtheta"), actual, exact, limits):
        assert a.dtype == (torch.float32 if name == "dtheta" else dtype)
        assert_close(a, b, limit=limit, name=name)


def test_every_angle_is_in_its_quadrant() -> None:
    theta = torch.linspace(-7.0, 7.0, 4000).view(1, -1)
    (made,) = lrpe((torch.ones(1, 1, 1, 4000),), torch.ones(1, 1).long(), theta,
                   implementation="triton")  # fmt: skip
    exact = torch.cat([theta.double().cos(), theta.double().sin()], -1)
    assert (made[0, 0] - exact).abs().max() <= 2 * EPS[torch.float32]


def test_one_three_and_uneven_tensors() -> None:
    x, y, positions, theta = make(5)
    positions = torch.randint(1000, (2, 5))
    for given in ((x,), (x, y, x)):
        exact = lrpe(tuple(z.double() for z in given), positions, theta.double())
        for a, b in zip(lrpe(given, positions, theta, implementation="triton"), exact, strict=True):
            assert_close(a, b)


def test_strides_change_nothing() -> None:
    x, y, positions, theta = make(9)
    moved = laid_out(x, "every_second"), laid_out(y, "reversed_dims")
    spread = torch.full((4, 18), -1)[::2, ::2].copy_(positions)
    exact = results(x, y, positions, theta, "triton")
    for a, b in zip(results(*moved, spread, theta, "triton"), exact, strict=True):
        assert torch.equal(a, b)


def test_the_library_op_passes_opcheck() -> None:
    x, y, positions, theta = make(3)
    op = torch.ops.transnormer.lrpe.default
    x, y, theta = (z.requires_grad_() for z in (x, y, theta))
    torch.library.opcheck(op, (x, y, positions, theta))
    torch.library.opcheck(op, (x, None, positions, theta))


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, _, positions, theta = make(3)
    with pytest.raises(ValueError, match="x has shape"):
        lrpe((x,), positions[:, :2], theta)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"x": ([0.0],)}, TypeError, "x is list"),
        ({"x": (torch.zeros(1, 3, 2, 4).long(),)}, TypeError, "x is torch.int64"),
        ({"positions": torch.arange(3)}, ValueError, r"positions has shape \[3\]"),
        ({"positions": torch.zeros(1, 3)}, TypeError, "positions is torch.float32"),
        ({"theta": torch.zeros(4)}, ValueError, r"theta has shape \[4\]"),
        ({"theta": torch.zeros(2, 4).long()}, TypeError, "theta is torch.int64"),
    ],
)
def test_wrong_inputs_are_refused(changes: dict, error: type[Exception], named: str) -> None:
    given = {
        "x": (torch.zeros(1, 3, 2, 4),),
        "positions": torch.arange(3)[None],
        "theta": torch.zeros(2, 4),
    }
    with pytest.raises(error, match=named):
        lrpe(**(given | changes))


def test_of_no_tensor_nothing_is_made() -> None:
    _, _, positions, theta = make(3)
    assert lrpe((), positions, theta) == ()
