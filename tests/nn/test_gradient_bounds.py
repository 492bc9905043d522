"""Which gradients of attention are bounded: the study of the TransNormer paper, both ways.

Qin et al. 2022, arXiv:2210.10340, sections 3.1 and 4.1. With p = f(s) / sum f(s), softmax has
|dp/ds| <= 1/4, and linear attention (f the identity, s = phi(q) phi(k)^T) |dp/ds| <= 1 / (4 |s|),
which no constant bounds as s goes to 0. A norm instead of the sum of weights has
|dL/ds| <= 3 c1 c2 d / (2 sqrt(eps)) with |dL/dO| <= c1 and |V| <= c2 entry by entry.
"""

import math

import pytest
import torch
from torch import Tensor

from transnormer.models.zoo.transnormer import norm_attention
from transnormer.nn.norms import NormConfig

TOKENS, DIM = 6, 8
# Rounding of a bound that is met exactly.
SLACK = 1.0 + 1e-9


def divided(scores: Tensor) -> Tensor:
    """Weights of linear attention: scores over their sum."""
    return scores / scores.sum(-1, keepdim=True)


def jacobian(weights, scores: Tensor) -> Tensor:
    """|d weights_j / d scores_k|, [TOKENS, TOKENS]."""
    return torch.autograd.functional.jacobian(weights, scores).abs()


def gradient(v: Tensor, upstream: Tensor, scores: Tensor, eps: float) -> Tensor:
    """|dL/ds| of L = upstream . norm(scores v)."""
    scores = scores.clone().requires_grad_()
    norm = NormConfig(eps=eps).build(DIM)
    (norm(scores @ v) * upstream).sum().backward()
    return scores.grad.abs()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_softmax_is_bounded_by_a_quarter(scale: float) -> None:
    for _ in range(20):
        scores = scale * torch.randn(TOKENS, dtype=torch.float64)
        assert jacobian(lambda s: s.softmax(-1), scores).max() <= 0.25 * SLACK
    # Two equal scores above all others meet it.
    scores = torch.tensor([0.0, 0.0, -99.0], dtype=torch.float64)
    assert jacobian(lambda s: s.softmax(-1), scores).max() > 0.2499


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_linear_attention_is_bounded_by_its_scores(scale: float) -> None:
    for _ in range(20):
        scores = scale * (torch.rand(TOKENS, dtype=torch.float64) + 1e-3)
        assert bool((jacobian(divided, scores) <= SLACK / (4 * scores)).all())


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-8])
def test_linear_attention_is_not_bounded_as_its_scores_vanish(size: float) -> None:
    # Two equal scores meet the bound 1 / (4 s), so it is as large as one likes.
    scores = torch.full((2,), size, dtype=torch.float64)
    assert jacobian(divided, scores).max() > 0.2499 / size


@pytest.mark.parametrize("size", [0.0, 1e-8, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("eps", [1e-8, 1e-4, 1.0])
def test_a_norm_is_bounded_whatever_the_scores(size: float, eps: float) -> None:
    for _ in range(20):
        v = 4 * torch.rand(TOKENS, DIM, dtype=torch.float64) - 2
        upstream = 6 * torch.rand(DIM, dtype=torch.float64) - 3
        scores = size * torch.randn(TOKENS, dtype=torch.float64)
        bound = 3 * 3 * 2 * DIM / (2 * eps**0.5)
        assert gradient(v, upstream, scores, eps).max() <= bound * SLACK


def test_the_bound_of_a_norm_is_met_up_to_a_constant() -> None:
    # All values and upstream gradients at their limits, and no output: 2/3 of the bound.
    v, upstream = torch.full((TOKENS, DIM), 2.0).double(), torch.full((DIM,), 3.0).double()
    scores = torch.zeros(TOKENS, dtype=torch.float64)
    bound = 3 * 3 * 2 * DIM / (2 * 1e-4**0.5)
    assert 0.66 * bound < gradient(v, upstream, scores, 1e-4).max() < 0.67 * bound


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_norm_attention_stays_bounded_where_the_sum_of_weights_vanishes(size: float) -> None:
    # elu has both signs: two keys whose scores cancel leave linear attention a sum near 0.
    heads, dim, eps = 1, 4, 1e-2
    config = norm_attention("t1", heads).model_copy(update={"norm": NormConfig(eps=eps)})
    mixer = config.build(dim, 0, 1, causal=True).double()
    with torch.no_grad():
        mixer.qkvu_proj.weight.copy_(torch.eye(dim).repeat(3, 1))
        mixer.qkvu_proj.bias.zero_()
        mixer.out_proj.weight.copy_(torch.eye(dim))
        mixer.out_proj.bias.zero_()
    # The first channel of phi is -1/2 + size and 1/2: scores that add up to size / 2.
    first = math.log(0.5 + size)
    x = torch.tensor(
        [[[first, 0.1, 0.2, 0.3], [0.5, 0.0, 0.0, 0.0]]], dtype=torch.float64
    ).requires_grad_()
    # One position for both tokens: LRPE then turns nothing.
    y, _ = mixer(x, positions=torch.zeros(1, 2, dtype=torch.long))
    (bounded,) = torch.autograd.grad(y[:, 1].sum(), x)

    elu = torch.nn.functional.elu
    scores = elu(x[0]) @ elu(x[0, 1])
    assert scores.sum().item() == pytest.approx(size / 2, rel=1e-6)
    (unbounded,) = torch.autograd.grad((divided(scores) @ x[0]).sum(), x)
    # phi, its slope, values and the upstream gradient are at most 1 here: two scores and the
    # values themselves, each within the bound.
    assert bounded.abs().max() <= 3 * 3 * dim / (2 * eps**0.5)
    assert unbounded.abs().max() > 0.01 / size
