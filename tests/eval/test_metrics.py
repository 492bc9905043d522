"""Figures and their standard errors, against sums written out."""

import math
import statistics

import pytest

from transnormer.eval import metrics


def test_the_error_of_a_mean_is_the_sample_deviation_over_sqrt_n() -> None:
    figure = metrics.mean([1.0, 0.0, 0.0, 1.0, 1.0])
    assert figure.value == 0.6
    error = statistics.stdev([1, 0, 0, 1, 1]) / math.sqrt(5)
    assert figure.stderr is not None
    assert math.isclose(figure.stderr, error)


def test_one_item_has_no_error() -> None:
    assert metrics.mean([1.0]) == (1.0, None)
    assert metrics.weighted_perplexity([-2.0], [2.0]) == (math.e, None)


def test_perplexities_are_exponentials_of_means() -> None:
    assert math.isclose(metrics.perplexity([-1.0, -3.0]).value, math.exp(2.0))
    words = metrics.weighted_perplexity([-6.0, -2.0], [3.0, 1.0])
    assert math.isclose(words.value, math.exp(2.0))
    # Both documents have the same rate: nothing is uncertain.
    assert words.stderr == pytest.approx(0.0, abs=1e-12)
    bits = metrics.bits_per_byte([-6.0, -2.0], [3.0, 1.0])
    assert math.isclose(bits.value, 2.0 / math.log(2.0))


def test_the_error_of_a_ratio_is_that_of_its_mean_for_equal_weights() -> None:
    logprobs = [-1.0, -2.5, -4.0, -2.0]
    ratio = metrics.bits_per_byte(logprobs, [1.0] * 4)
    plain = metrics.mean(logprobs)
    assert ratio.stderr is not None
    assert plain.stderr is not None
    assert math.isclose(ratio.stderr * math.log(2.0), plain.stderr)


def test_a_perplexity_beyond_float_is_infinite() -> None:
    assert metrics.perplexity([-1000.0, -1000.0]).value == math.inf


def test_answers_are_compared_without_case_articles_and_punctuation() -> None:
    assert metrics.normalized(" The  Cat, sat. ") == "cat sat"
    assert metrics.f1("the cat", ["A cat!", "dog"]) == 100.0
    assert math.isclose(metrics.f1("a black cat", ["the cat"]), 200.0 / 3.0)
    assert metrics.f1("", ["cat"]) == 0.0


def test_rouge_counts_words_pairs_and_the_longest_subsequence() -> None:
    one, two, longest = metrics.rouge_scores("the cat sat here", ["The cat lay here."])
    assert math.isclose(one, 75.0)
    assert math.isclose(two, 100.0 / 3.0)
    assert math.isclose(longest, 75.0)
    mean = (one * two * longest) ** (1 / 3)
    assert math.isclose(metrics.rouge("the cat sat here", ["The cat lay here.", "x"]), mean)
