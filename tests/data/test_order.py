"""The order of samples: bijections and mixtures without a state."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transnormer.data.order import Mixture, hash_key, permute

FAST = settings(max_examples=60, deadline=None)


@FAST
@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_every_place_is_about_equally_likely() -> None:
    size, keys = 10, 4000
    counts = [[0] * size for _ in range(size)]
    for number in range(keys):
        key = hash_key(number)
        for index in range(size):
            counts[index][permute(index, size, key)] += 1
    expected = keys / size
    # Five standard deviations of a binomial count.
    assert max(abs(count - expected) for row in counts for count in row) < 5 * expected**0.5


def test_neighbours_do_not_stay_neighbours() -> None:
    size = 1000
    places = [permute(index, size, hash_key(1)) for index in range(size)]
    assert sum(abs(a - b) == 1 for a, b in zip(places, places[1:])) < 10


def test_keys_differ_by_part_and_order() -> None:
    assert len({hash_key(*parts) for parts in [(), (0,), (0, 0), (0, 1), (1, 0), (1,)]}) == 6


@FAST
@given(weights=st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3))
def test_each_source_is_numbered_without_gaps(weights: list[float]) -> None:
    mixture = Mixture(weights)
    counts = [0] * len(weights)
    for sample in range(200):
        source, number = mixture.locate(sample)
        assert number == counts[source]
        counts[source] += 1


@pytest.mark.parametrize(
    "weights", [[1.0], [1, 1], [0.9, 0.1], [3, 2, 1, 1e-3], [0, 1, 0, 2], [0.5, 0.3, 0.2]]
)
def test_the_mixture_is_within_a_thousandth_after_ten_thousand_samples(
    weights: list[float],
) -> None:
    samples = 10_000
    mixture = Mixture(weights)
    counts = Counter(mixture.locate(sample)[0] for sample in range(samples))
    for source, weight in enumerate(weights):
        assert abs(counts[source] / samples - weight / sum(weights)) < 1e-3


def test_a_rare_source_comes_evenly() -> None:
    mixture = Mixture([0.25, 0.75])
    places = [k for k in range(40) if mixture.locate(k)[0] == 0]
    assert {b - a for a, b in zip(places, islice(places, 1, None))} == {4}


def test_far_samples_are_located_at_once() -> None:
    weights = [0.3, 0.7]
    source, number = Mixture(weights).locate(10**15)
    # Shares are rounded to 40 bits.
    assert abs(number / 10**15 - weights[source]) < 2**-40


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "weights is empty"),
        ([0.0, 0.0], "weights are all 0"),
        ([1.0, -1.0], r"data.weights\[1\] is -1.0; expected a finite number >= 0"),
        ([float("nan")], r"data.weights\[0\] is nan"),
        ([float("inf")], r"data.weights\[0\] is inf"),
    ],
)
def test_impossible_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(weights)
