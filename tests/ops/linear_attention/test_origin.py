"""A study: the authors' first inference form overflows; the robust one, used here, does not.

The first form splits decay^(t - s) into decay^t on the query and decay^-s on the key (Qin et al.
2023, arXiv:2307.14995, section 3.4.1). decay^-s leaves float32 at 88.7 / slope tokens.
"""

import math

import oracles
import pytest
import torch
from attention_cases import make_inputs
from tolerances import assert_close

from transnormer.ops import linear_attention
from transnormer.ops.linear_attention import reference


@pytest.mark.parametrize("slope", [0.5, 2**-0.25, 0.3])
def test_origin_form_overflows_where_the_exponent_says(slope: float) -> None:
    # Growth beyond the largest float32; a token counts from 1.
    limit = math.floor(math.log(torch.finfo(torch.float32).max) / slope)
    seq = limit + 8
    q, k, v = (torch.ones(1, seq, 1, 4) for _ in range(3))
    o = reference.origin_recurrence(q, k, v, torch.tensor([-slope]))
    finite = torch.isfinite(o).all(-1)[0, :, 0]
    first = int(finite.logical_not().nonzero()[0])
    # The state's sum reaches the limit a few tokens before a single term does.
    assert limit - math.ceil(3 / slope) <= first <= limit
    assert not bool(finite[first:].any())


def test_origin_form_fails_by_token_178_at_slope_one_half() -> None:
    q, k, v = (torch.ones(1, 200, 1, 4) for _ in range(3))
    o = reference.origin_recurrence(q, k, v, torch.tensor([-0.5]))
    assert bool(torch.isfinite(o[:, :170]).all())
    assert not bool(torch.isfinite(o[:, 177:]).any())


def test_origin_form_is_right_while_it_lasts() -> None:
    q, k, v, _, _ = make_inputs(60, heads=2)
    log_decay = torch.tensor([-0.5, -0.1])
    exact, _ = oracles.linear_attention(q, k, v, log_decay)
    assert_close(reference.origin_recurrence(q, k, v, log_decay), exact, limit=1e-4)


@pytest.mark.parametrize("slope", [0.5, 0.841, 30.0])
def test_robust_form_stays_finite_where_the_origin_form_fails(slope: float) -> None:
    q, k, v, _, _ = make_inputs(2000, heads=1)
    log_decay = torch.tensor([-slope])
    o, state = linear_attention(q, k, v, log_decay)
    assert not bool(torch.isfinite(reference.origin_recurrence(q, k, v, log_decay)).all())
    exact, exact_state = oracles.linear_attention(q, k, v, log_decay)
    assert_close(o, exact)
    assert_close(state, exact_state)


@pytest.mark.slow
@pytest.mark.parametrize("slope", [0.5, 1e-5])
def test_robust_form_stays_finite_for_a_million_tokens(slope: float) -> None:
    q, k, v, _, _ = make_inputs(1_000_000, batch=1, heads=1)
    o, state = linear_attention(q, k, v, torch.tensor([-slope]))
    assert bool(torch.isfinite(o).all())
    assert bool(torch.isfinite(state).all())
