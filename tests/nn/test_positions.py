"""LRPE: doubling, relative scores, and angles that no dtype and no distance rounds."""

import oracles
import pytest
import torch
from tolerances import LRPE_OFFSET, assert_close, relative_error

from transnormer.nn.positions import Lrpe

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
