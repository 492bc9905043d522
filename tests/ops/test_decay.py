"""The slopes of the released models, list by list, and their course over the layers."""

import math

import oracles
import pytest
import torch
from tolerances import assert_close

from transnormer.ops import decay

# Qin et al. 2023 (arXiv:2307.14995) take ALiBi's lists; printed here as far as they are published.
HALVES = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
PUBLISHED = {
    8: HALVES,
    12: [*HALVES, 0.70711, 0.35355, 0.17678, 0.08839],
    16: [2 ** (-h / 2) for h in range(1, 17)],
    20: [*(2 ** (-h / 2) for h in range(1, 17)), 0.8409, 0.5946, 0.42045, 0.2973],
    32: [2 ** (-h / 4) for h in range(1, 33)],
    40: [
        *(2 ** (-h / 4) for h in range(1, 33)),
        *(0.917, 0.77111, 0.64842, 0.54525, 0.4585, 0.38555, 0.32421, 0.27263),
    ],
}


@pytest.mark.parametrize("heads", PUBLISHED)
def test_first_layer_has_the_published_slopes(heads: int) -> None:
    # 24 layers; the first layer's factor is 1.00001.
    slopes = -decay.tnl_log_decay(heads, 0, 24).double() / 1.00001
    published = torch.tensor(PUBLISHED[heads], dtype=torch.float64)
    assert slopes.shape == (heads,)
    torch.testing.assert_close(slopes, published, rtol=2e-5, atol=0)


@pytest.mark.parametrize("heads", PUBLISHED)
def test_last_layer_forgets_almost_nothing(heads: int) -> None:
    last = decay.tnl_log_decay(heads, 23, 24).double()
    published = torch.tensor(PUBLISHED[heads], dtype=torch.float64)
    torch.testing.assert_close(last, -1e-5 * published, rtol=2e-5, atol=0)


@pytest.mark.parametrize("heads", [1, 3, 8, 12, 96])
@pytest.mark.parametrize("num_layers", [2, 5, 24])
def test_rule_matches_the_oracle_and_rises_with_depth(heads: int, num_layers: int) -> None:
    layers = [decay.tnl_log_decay(heads, i, num_layers) for i in range(num_layers)]
    for i, log_decay in enumerate(layers):
        assert log_decay.dtype == torch.float32
        assert_close(log_decay, oracles.tnl_log_decay(heads, i, num_layers))
    for lower, upper in zip(layers, layers[1:]):
        assert bool((upper > lower).all())
    assert bool((layers[-1] < 0).all())


def test_one_layer_divides_by_nothing() -> None:
    assert_close(decay.tnl_log_decay(8, 0, 1), oracles.tnl_log_decay(8, 0, 1))


@pytest.mark.parametrize(
    ("heads", "layer_index", "num_layers", "named"),
    [(0, 0, 1, "heads"), (8, 2, 2, "layer_index"), (8, -1, 2, "layer_index"), (8, 0, 0, "num")],
)
def test_impossible_counts_are_refused(
    heads: int, layer_index: int, num_layers: int, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        decay.tnl_log_decay(heads, layer_index, num_layers)


def test_without_temperature_every_layer_is_alike() -> None:
    first = decay.tnl_log_decay(8, 0, 6, temperature=False)
    last = decay.tnl_log_decay(8, 5, 6, temperature=False)
    assert torch.equal(first, last)
    torch.testing.assert_close(-first, torch.tensor(HALVES))


def test_paper_rule_is_the_printed_formula() -> None:
    # -(8 h / H) (1 - l / L) with h from 0 and l from 1: a fixed ladder of heads, none at the end.
    log_decay = decay.tnl_log_decay(4, 0, 2, rule="paper")
    torch.testing.assert_close(log_decay, -torch.tensor([0.0, 2.0, 4.0, 6.0]) * 0.5)
    assert bool((decay.tnl_log_decay(4, 1, 2, rule="paper") == 0).all())


def test_geometric_rule_spans_2_to_256_tokens() -> None:
    log_decay = decay.tnl_log_decay(8, 0, 2, rule="geometric", temperature=False)
    assert math.isclose(log_decay[0].item(), -1 / 2, rel_tol=1e-6)
    assert math.isclose(log_decay[-1].item(), -1 / 256, rel_tol=1e-6)
    ratios = log_decay[1:] / log_decay[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(7))


def test_none_rule_never_forgets() -> None:
    assert bool((decay.tnl_log_decay(8, 0, 2, rule="none") == 0).all())


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="rule"):
        decay.tnl_log_decay(8, 0, 2, rule="linear")


@pytest.mark.parametrize("heads", [1, 2, 8, 32])
def test_retnet_rules_are_the_printed_formulas(heads: int) -> None:
    rules = {
        "retnet": [1 - 2.0 ** (-5 - h) for h in range(heads)],
        "linspace": [1 - (1 / 32) * (1 / 16) ** (h / max(heads - 1, 1)) for h in range(heads)],
    }
    for rule, gammas in rules.items():
        exact = torch.tensor(gammas, dtype=torch.float64)
        assert_close(decay.retnet_log_decay(heads, rule=rule, dtype=torch.float64).exp(), exact)
        log_decay = decay.retnet_log_decay(heads, rule=rule)
        assert log_decay.dtype == torch.float32
        assert bool((log_decay < 0).all())
        assert bool((log_decay.diff() > 0).all())


def test_retnet_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="heads is 0"):
        decay.retnet_log_decay(0)
    with pytest.raises(ValueError, match="rule is 'tnl'"):
        decay.retnet_log_decay(2, rule="tnl")
