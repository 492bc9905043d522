"""Sampling: which tokens may be drawn, how often, and what a draw depends on."""

import math

import pytest
import torch

from transnormer.config import validate
from transnormer.infer.sampling import (
    Draws,
    SamplingConfig,
    TokenHistory,
    sample,
    token_logprobs,
)

LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0, 2.5]])


def drawn(config: SamplingConfig, count: int = 4000) -> torch.Tensor:
    """How often each token is drawn over evenly spaced uniform numbers, [vocab_size]."""
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = sample(LOGITS.expand(count, -1), config, uniforms)
    return torch.bincount(tokens, minlength=5).double() / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    expected = (LOGITS[0].double() / temperature).softmax(0)
    difference = drawn(SamplingConfig(temperature=temperature)) - expected
    assert difference.abs().max() <= 1 / 4000


def test_temperature_zero_takes_the_likeliest() -> None:
    assert sample(LOGITS, SamplingConfig(temperature=0.0), None).tolist() == [4]


@pytest.mark.parametrize("temperature", [1e-30, 5e-324])
def test_a_tiny_temperature_does_not_overflow(temperature: float) -> None:
    assert drawn(SamplingConfig(temperature=temperature))[4] == 1.0


def test_top_k_keeps_the_k_likeliest() -> None:
    expected = torch.zeros(5, dtype=torch.float64)
    expected[[1, 2, 4]] = LOGITS[0, [1, 2, 4]].double().softmax(0)
    assert (drawn(SamplingConfig(top_k=3)) - expected).abs().max() <= 1 / 4000


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert (drawn(SamplingConfig(top_k=50)) - drawn(SamplingConfig())).abs().max() <= 1 / 2000


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, [4]), (0.6, [1, 4]), (0.9, [1, 2, 4])])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: list[int]) -> None:
    frequencies = drawn(SamplingConfig(top_p=top_p))
    assert frequencies.nonzero().flatten().tolist() == kept


def test_top_p_of_one_keeps_all() -> None:
    assert (drawn(SamplingConfig(top_p=1.0)) - drawn(SamplingConfig())).abs().max() <= 1 / 2000


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.5, -math.inf]])
    for value in (0.0, 0.5, math.nextafter(1.0, 0.0)):
        token = sample(logits, SamplingConfig(), torch.tensor([value], dtype=torch.float64))
        assert token.item() in (1, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, bad]])
    with pytest.raises(ValueError, match=r"largest logit of row 1 is (nan|inf); expected a finite"):
        sample(logits, SamplingConfig(temperature=0.0), None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected a finite number of at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'; expected a number"),
        ({"top_k": 0}, "top_k is 0; expected at least 1"),
        ({"top_k": 2.5}, "top_k is 2.5; expected an integer"),
        ({"top_p": 0.0}, "top_p is 0.0; expected 0 < top_p <= 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 0.0}, "min_p is 0.0; expected 0 < min_p <= 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected a finite number above"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan; expected a finite number"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf; expected a finite number"),
        ({"logit_bias": [[-1, 1.0]]}, "logit_bias names the token -1; expected at least 0"),
        ({"logit_bias": [[1, math.nan]]}, "logit_bias of token 1 is nan; expected a finite"),
        ({"logit_bias": [[1, math.inf]]}, "logit_bias of token 1 is inf; expected a finite"),
    ],
)
def test_values_out_of_range_are_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        validate(SamplingConfig, values, source="test")
    assert "\n" not in str(caught.value)


def test_draws_depend_on_seed_and_row_alone() -> None:
    few, many = Draws(7, 2), Draws(7, 5)
    for _ in range(3):
        a, b = few.next([True, True]), many.next([True] * 5)
        assert torch.equal(a, b[:2])
        assert len(set(b.tolist())) == 5
    assert Draws(8, 1).next([True]) != Draws(7, 1).next([True])


def test_a_row_that_rests_draws_on_where_it_was() -> None:
    resting, steady = Draws(7, 2), Draws(7, 2)
    first = steady.next([True, True])
    assert resting.next([True, False])[0] == first[0]
    assert resting.next([False, True])[1] == first[1]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed is .*; expected 0 <= seed < 2\^64"):
        Draws(seed, 1)


@pytest.mark.parametrize(("min_p", "kept"), [(0.5, [1, 4]), (0.9, [4]), (0.1, [1, 2, 4])])
def test_min_p_keeps_what_is_likely_beside_the_likeliest(min_p: float, kept: list[int]) -> None:
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = LOGITS[0, kept].double().softmax(0)
    assert (drawn(SamplingConfig(min_p=min_p)) - expected).abs().max() <= 1 / 4000


def test_a_row_is_drawn_by_its_own_configuration() -> None:
    configs = [
        SamplingConfig(temperature=0.0),
        SamplingConfig(),
        SamplingConfig(top_k=3),
        SamplingConfig(top_k=7, top_p=0.7),
        SamplingConfig(top_p=0.6, temperature=2.0),
        SamplingConfig(min_p=0.2),
        SamplingConfig(top_k=2, min_p=0.3),
    ]
    logits, uniforms = torch.randn(7, 50), torch.rand(7, dtype=torch.float64)
    together = sample(logits, configs, uniforms)
    for row, config in enumerate(configs):
        part = slice(row, row + 1)
        assert together[row] == sample(logits[part], config, uniforms[part])[0]


def test_penalties_and_bias_are_their_formulas() -> None:
    history = TokenHistory([0, 3])
    for token in (1, 1, 3):
        history.add(token)
    logits = torch.tensor([2.0, 3.0, 1.0, -4.0, 0.5])
    config = SamplingConfig(
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        logit_bias=((2, 1.5), (4, -math.inf)),
    )
    expected = [1.0, 1.5 - 0.25 - 1.0, 2.5, -8.0 - 0.25 - 0.5, -math.inf]
    assert history.adjust(logits, config).tolist() == expected
    assert logits.tolist() == [2.0, 3.0, 1.0, -4.0, 0.5]
    assert config.adjusts
    assert not SamplingConfig(temperature=0.3, top_k=2, min_p=0.5).adjusts


def test_without_a_history_penalties_change_nothing() -> None:
    config = SamplingConfig(repetition_penalty=2.0, presence_penalty=1.0)
    assert torch.equal(TokenHistory().adjust(LOGITS[0], config), LOGITS[0])


def test_log_probabilities_are_those_of_the_logits() -> None:
    (entry,) = token_logprobs(LOGITS[:1].bfloat16(), [2], 3)
    exact = LOGITS[0].double().log_softmax(0)
    assert entry.logprob == pytest.approx(exact[2].item(), abs=1e-6)
    assert [token for token, _ in entry.top] == [4, 1, 2]
    assert [value for _, value in entry.top] == pytest.approx(exact[[4, 1, 2]].tolist(), abs=1e-6)
    assert token_logprobs(LOGITS[:1], [0], 0)[0].top == ()
