"""LRPE: doubling, relative scores, and angles that no dtype and no distance rounds."""

import oracles
import pytest
import torch
from tolerances import LRPE_OFFSET, assert_close, relative_error

from transnormer.nn.positions import Lrpe, MdLrpe

HEADS, HEAD_DIM = 3, 16


def encode(dtype: torch.dtype, start: int = 0, seq: int = 50) -> tuple[Lrpe, torch.Tensor]:
    lrpe = Lrpe(HEADS, HEAD_DIM).to(dtype)
    return lrpe, torch.arange(start, start + seq).expand(2, -1)


def test_theta_is_one_ladder_over_all_heads() -> None:
    lrpe = Lrpe(HEADS, HEAD_DIM)
    assert lrpe.theta.shape == (HEADS, 1, HEAD_DIM)
    assert lrpe.theta.requires_grad
    assert_close(lrpe.theta, oracles.lrpe_theta(HEADS, HEAD_DIM))


def test_head_init_repeats_one_ladder() -> None:
    theta = Lrpe(HEADS, HEAD_DIM, init="head").theta
    assert_close(theta[2:], oracles.lrpe_theta(1, HEAD_DIM))
    assert torch.equal(theta[0], theta[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_encoding_matches_the_formula(dtype: torch.dtype) -> None:
    lrpe, positions = encode(dtype)
    x = torch.randn(2, 50, HEADS, HEAD_DIM, dtype=dtype)
    (y,) = lrpe((x,), positions)
    assert y.shape == (2, 50, HEADS, 2 * HEAD_DIM)
    assert y.dtype == dtype
    assert_close(y, oracles.lrpe(x, positions, lrpe.theta))


def test_scores_depend_on_the_distance_alone() -> None:
    lrpe, positions = encode(torch.float64)
    q, k = torch.randn(2, 2, 50, HEADS, HEAD_DIM, dtype=torch.float64)
    rotated_q, rotated_k = lrpe((q, k), positions)
    scores = torch.einsum("bthk,bshk->bhts", rotated_q, rotated_k)
    distance = positions[0][:, None] - positions[0]
    cosines = (distance[..., None, None] * lrpe.theta[:, 0]).cos()
    assert_close(scores, torch.einsum("bthk,bshk,tshk->bhts", q, k, cosines))


@pytest.mark.parametrize("offset", [1, 4096, 4_000_000])
def test_scores_at_an_offset_equal_those_at_zero(offset: int) -> None:
    lrpe, positions = encode(torch.float32)
    # Frequencies as learned ones may be: no round numbers, some beyond one turn a token.
    with torch.no_grad():
        lrpe.theta.uniform_(-4.0, 4.0)
    q, k = torch.randn(2, 2, 50, HEADS, HEAD_DIM)
    scores = []
    for start in (0, offset):
        rotated_q, rotated_k = lrpe((q, k), positions + start)
        scores.append(torch.einsum("bthk,bshk->bhts", rotated_q.double(), rotated_k.double()))
    assert relative_error(scores[1], scores[0]) <= LRPE_OFFSET
    assert (scores[1] - scores[0]).abs().max() / scores[0].std() <= LRPE_OFFSET


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_neither_theta_nor_angles(dtype: torch.dtype) -> None:
    exact, positions = encode(torch.float32, seq=4096)
    half = Lrpe(HEADS, HEAD_DIM).to(dtype)
    assert half.theta.dtype == torch.float32
    assert torch.equal(half.theta, exact.theta)
    assert torch.equal(half.angles(positions), exact.angles(positions))
    x = torch.randn(2, 4096, HEADS, HEAD_DIM).to(dtype)
    (y,) = half((x,), positions)
    assert y.dtype == dtype
    assert_close(y, oracles.lrpe(x, positions, exact.theta))


def test_theta_gets_its_gradient() -> None:
    lrpe, positions = encode(torch.float64, start=100, seq=5)
    q, k = torch.randn(2, 2, 5, HEADS, HEAD_DIM, dtype=torch.float64)
    theta = lrpe.theta.detach().clone().requires_grad_()
    rotated = [oracles.lrpe(x, positions, theta) for x in (q, k)]
    torch.einsum("bthk,bshk->bhts", *rotated).square().sum().backward()
    rotated = lrpe((q, k), positions)
    torch.einsum("bthk,bshk->bhts", *rotated).square().sum().backward()
    assert_close(lrpe.theta.grad, theta.grad, limit=1e-10)


def test_rows_may_stand_at_different_positions() -> None:
    lrpe, _ = encode(torch.float32)
    x = torch.randn(2, 4, HEADS, HEAD_DIM)
    positions = torch.tensor([[5, 6, 7, 8], [0, 0, 1, 2]])
    assert_close(lrpe((x,), positions)[0], oracles.lrpe(x, positions, lrpe.theta))


def test_half_init_leaves_the_slower_half_alone_for_good() -> None:
    lrpe = Lrpe(HEADS, HEAD_DIM, init="half").double()
    fast = HEAD_DIM // 2
    assert_close(lrpe.theta[:1, :, :fast], oracles.lrpe_theta(1, HEAD_DIM)[..., :fast], limit=1e-7)
    assert lrpe.theta[..., fast:].eq(0).all()
    q, k = torch.randn(2, 2, 50, HEADS, HEAD_DIM, dtype=torch.float64)
    q, k = lrpe((q, k), torch.arange(50).expand(2, -1))
    torch.einsum("bthk,bshk->bhts", q, k).square().sum().backward()
    scale = lrpe.theta.grad.abs().max()
    assert lrpe.theta.grad[..., fast:].abs().max() <= 1e-13 * scale


def grid_of(extents: tuple[int, ...]) -> torch.Tensor:
    """Coordinates of a row-major grid, [seq, axes]."""
    return torch.cartesian_prod(*(torch.arange(n) for n in extents)).view(-1, len(extents))


@pytest.mark.parametrize("init", ["global", "head", "half"])
@pytest.mark.parametrize("shape", [None, (50,)], ids=["positions", "shape"])
def test_one_axis_of_mdlrpe_is_lrpe(init: str, shape: tuple[int, ...] | None) -> None:
    one, many = Lrpe(HEADS, HEAD_DIM, init=init), MdLrpe(HEADS, HEAD_DIM, init=init)
    assert torch.equal(one.theta, many.theta)
    x, positions = torch.randn(2, 50, HEADS, HEAD_DIM), torch.arange(7, 57).expand(2, -1)
    assert torch.equal(one((x,), positions)[0], many((x,), positions, shape)[0])


@pytest.mark.parametrize("extents", [(5, 7), (2, 3, 4), (2, 2, 2, 3)], ids=str)
def test_scores_depend_on_the_differences_of_coordinates_alone(extents: tuple[int, ...]) -> None:
    axes, lead = len(extents), 2
    lrpe = MdLrpe(HEADS, HEAD_DIM, axes=axes, condition_tokens=lead).double()
    with torch.no_grad():
        lrpe.theta.uniform_(-4.0, 4.0)
    part = -(-HEAD_DIM // axes)
    assert lrpe.theta.shape == (HEADS, 1, part)
    grid = torch.cat([torch.zeros(lead, axes, dtype=torch.int64), grid_of(extents)])
    seq = grid.shape[0]
    q, k = torch.randn(2, 1, seq, HEADS, HEAD_DIM, dtype=torch.float64)
    rotated_q, rotated_k = lrpe((q, k), torch.zeros(1, seq, dtype=torch.int64), extents)
    assert rotated_q.shape == (1, seq, HEADS, 2 * HEAD_DIM)
    scores = torch.einsum("bthk,bshk->bhts", rotated_q, rotated_k)
    channel = torch.arange(HEAD_DIM)
    difference = (grid[:, None] - grid)[..., channel // part]
    cosines = (difference[:, :, None] * lrpe.theta[:, 0, channel % part]).cos()
    assert_close(scores, torch.einsum("bthk,bshk,tshk->bhts", q, k, cosines).detach())


def test_condition_tokens_are_not_turned() -> None:
    lrpe = MdLrpe(HEADS, HEAD_DIM, axes=2, condition_tokens=3)
    x = torch.randn(1, 9, HEADS, HEAD_DIM)
    (y,) = lrpe((x,), torch.arange(9)[None], (2, 3))
    assert torch.equal(y[:, :3], torch.cat([x, torch.zeros_like(x)], -1)[:, :3])


def test_a_grid_that_does_not_fit_is_refused() -> None:
    lrpe = MdLrpe(HEADS, HEAD_DIM, axes=2)
    x, positions = torch.randn(1, 12, HEADS, HEAD_DIM), torch.arange(12)[None]
    with pytest.raises(ValueError, match="shape is None; expected 2 extents"):
        lrpe((x,), positions)
    with pytest.raises(ValueError, match=r"shape is \(12,\); expected 2 extents"):
        lrpe((x,), positions, (12,))
    with pytest.raises(ValueError, match=r"shape is \(3, 5\), 15 tokens; expected the 12"):
        lrpe((x,), positions, (3, 5))
    with pytest.raises(ValueError, match="shape is None; expected 1 extents"):
        MdLrpe(HEADS, HEAD_DIM, condition_tokens=1)((x,), positions)
