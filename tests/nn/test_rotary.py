"""Rotary positions: pairs that turn, relative scores, angles that no dtype and no distance rounds."""

import math

import pytest
import torch
from tolerances import LRPE_OFFSET, assert_close, relative_error
from torch import Tensor

from transnormer.nn.rotary import Pairs, Rotary

HEADS, HEAD_DIM, SEQ = 3, 16, 50
FORMS = {
    "halves": {},
    "neighbours": {"pairs": "neighbours"},
    "last_included": {"last_included": True, "pairs": "neighbours"},
    "reflected": {"reflect": True, "learned": True},
    "base_1e6": {"base": 1e6},
}
every_form = pytest.mark.parametrize("form", FORMS)


def positions_from(start: int) -> Tensor:
    return torch.arange(start, start + SEQ).expand(2, -1)


def turned(x: Tensor, positions: Tensor, theta: Tensor, pairs: Pairs) -> Tensor:
    """Each pair of channels as one complex number, times e^(i position theta), in float64."""
    x = x.double()
    split = (
        x.unflatten(-1, (2, -1)).movedim(-2, -1) if pairs == "halves" else x.unflatten(-1, (-1, 2))
    )
    angles = positions[..., None, None].double() * theta.double()
    out = torch.view_as_real(torch.view_as_complex(split.contiguous()) * torch.exp(1j * angles))
    return (out.movedim(-1, -2) if pairs == "halves" else out).flatten(-2)


def scores(rotary: Rotary, q: Tensor, k: Tensor, start: int) -> Tensor:
    q, k = rotary((q, k), positions_from(start))
    return torch.einsum("bthk,bshk->bhts", q.double(), k.double())


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_pairs_turn_by_position_times_theta(pairs: Pairs, dtype: torch.dtype) -> None:
    rotary = Rotary(HEAD_DIM, pairs=pairs).to(dtype)
    x = torch.randn(2, SEQ, HEADS, HEAD_DIM).to(dtype)
    (y,) = rotary((x,), positions_from(1000))
    assert y.dtype == dtype
    theta = 10_000.0 ** (-torch.arange(HEAD_DIM // 2, dtype=torch.float64) / (HEAD_DIM // 2))
    assert_close(y, turned(x, positions_from(1000), theta, pairs))


def test_last_included_frequencies_reach_one_over_base() -> None:
    theta = Rotary(HEAD_DIM, last_included=True, base=500.0).theta
    exact = 500.0 ** -torch.linspace(0, 1, HEAD_DIM // 2, dtype=torch.float64)
    assert_close(theta, exact, limit=1e-14)
    assert theta[-1].item() == pytest.approx(1 / 500.0, rel=1e-14)
    assert Rotary(HEAD_DIM, base=500.0).theta[-1] > 1 / 500.0


def test_reflection_is_a_fixed_unit_vector_applied_first() -> None:
    rotary = Rotary(HEAD_DIM, reflect=True).double()
    v = rotary.reflection
    assert v.norm().item() == pytest.approx(1.0)
    assert not v.requires_grad
    x = torch.randn(2, SEQ, HEADS, HEAD_DIM, dtype=torch.float64)
    reflected = x - 2 * torch.einsum("bthk,k,j->bthj", x, v, v)
    assert_close(
        rotary((x,), positions_from(0))[0],
        turned(reflected, positions_from(0), rotary.theta, "halves"),
    )
    assert "reflection" in rotary.state_dict()


@every_form
def test_scores_depend_on_the_distance_alone(form: str) -> None:
    rotary = Rotary(HEAD_DIM, **FORMS[form]).double()
    q, k = torch.randn(2, 1, HEADS, HEAD_DIM, dtype=torch.float64).expand(2, 2, SEQ, -1, -1)
    found = scores(rotary, q[:2], k[:2], 0)
    for t, s in ((7, 3), (49, 10), (5, 30)):
        assert_close(found[:, :, t, s], found[:, :, t - min(t, s), s - min(t, s)])


@every_form
@pytest.mark.parametrize("offset", [1, 4096, 4_000_000])
def test_scores_at_an_offset_equal_those_at_zero(form: str, offset: int) -> None:
    rotary = Rotary(HEAD_DIM, **FORMS[form])
    q, k = torch.randn(2, 2, SEQ, HEADS, HEAD_DIM)
    near, far = scores(rotary, q, k, 0), scores(rotary, q, k, offset)
    assert relative_error(far, near) <= LRPE_OFFSET
    assert (far - near).abs().max() / near.std() <= LRPE_OFFSET


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_half_precision_rounds_neither_theta_nor_angles(dtype: torch.dtype, learned: bool) -> None:
    exact = Rotary(HEAD_DIM, learned=learned, reflect=True)
    half = Rotary(HEAD_DIM, learned=learned, reflect=True)
    half.load_state_dict(exact.state_dict())
    half.to(dtype)
    assert half.theta.dtype == (torch.float32 if learned else torch.float64)
    assert torch.equal(half.theta, exact.theta)
    assert torch.equal(half.reflection, exact.reflection)
    x = torch.randn(2, SEQ, HEADS, HEAD_DIM).to(dtype)
    (y,) = half((x,), positions_from(4_000_000))
    (wanted,) = exact((x.float(),), positions_from(4_000_000))
    assert y.dtype == dtype
    assert torch.equal(y, wanted.to(dtype))


def test_learned_theta_gets_its_gradient_and_fixed_theta_is_not_saved() -> None:
    rotary = Rotary(HEAD_DIM, learned=True).double()
    x = torch.randn(2, SEQ, HEADS, HEAD_DIM, dtype=torch.float64)
    weights = torch.randn_like(x)
    theta = rotary.theta.detach().clone().requires_grad_()
    (turned(x, positions_from(9), theta, "halves") * weights).sum().backward()
    (rotary((x,), positions_from(9))[0] * weights).sum().backward()
    assert_close(rotary.theta.grad, theta.grad, limit=1e-10)
    fixed = Rotary(HEAD_DIM)
    assert not fixed.state_dict()
    assert not list(fixed.parameters())


def test_rows_may_stand_at_different_positions() -> None:
    rotary = Rotary(HEAD_DIM)
    x = torch.randn(2, 4, HEADS, HEAD_DIM)
    positions = torch.tensor([[5, 6, 7, 8], [0, 0, 1, 2]])
    assert_close(rotary((x,), positions)[0], turned(x, positions, rotary.theta, "halves"))
    # Expanded rows are computed once.
    same = positions[:1].expand(2, -1)
    assert torch.equal(rotary((x,), same)[0], rotary((x,), same.clone())[0])


def test_two_pairs_and_one_have_their_frequencies() -> None:
    assert Rotary(4).theta.tolist() == pytest.approx([1.0, 1 / math.sqrt(10_000)])
    assert Rotary(2, last_included=True).theta.tolist() == [1.0]


def test_odd_head_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim is 5"):
        Rotary(5)


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_a_compiled_graph_turns_by_the_same_angles(pairs: Pairs) -> None:
    torch._dynamo.reset()
    rotary = Rotary(HEAD_DIM, pairs=pairs)
    x = torch.randn(2, 9, 3, HEAD_DIM, requires_grad=True)
    positions = torch.arange(4_000_000, 4_000_009).expand(2, -1)
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    (found,), (exact,) = compiled((x,), positions), rotary((x,), positions)
    assert torch.equal(found, exact)
    weights = torch.randn_like(x)
    assert torch.equal(*(torch.autograd.grad(y, x, weights)[0] for y in (found, exact)))
