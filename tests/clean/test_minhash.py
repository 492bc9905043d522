"""Signatures agree as often as the Jaccard index says."""

import math

import numpy as np
import pytest
import tolerances

from transnormer.clean import minhash
from transnormer.clean.minhash import MinHash, found_probability
from transnormer.clean.words import jaccard


@pytest.mark.parametrize("shared", [0, 300, 700, 1000])
def test_single_rows_agree_with_the_probability_of_the_jaccard_index(shared: int) -> None:
    random = np.random.default_rng(shared)
    common = random.integers(0, 1 << 63, shared, dtype=np.uint64)
    a, b = (
        np.unique(np.append(common, random.integers(0, 1 << 63, 1000 - shared, dtype=np.uint64)))
        for _ in range(2)
    )
    bands = 2000
    minhash = MinHash(bands=bands, rows=1, seed=1)
    agree = float(np.mean(minhash.bands(a) == minhash.bands(b)))
    index = jaccard(a, b)
    deviation = math.sqrt(max(index * (1 - index), 1 / bands) / bands)
    assert abs(agree - index) <= tolerances.STANDARD_DEVIATIONS * deviation


def test_a_band_agrees_only_where_all_its_rows_do() -> None:
    random = np.random.default_rng(1)
    common = random.integers(0, 1 << 63, 500, dtype=np.uint64)
    a = np.unique(common)
    b = np.unique(np.append(common[:400], random.integers(0, 1 << 63, 100, dtype=np.uint64)))
    one = MinHash(bands=900, rows=1, seed=3)
    three = MinHash(bands=300, rows=3, seed=3)
    rows = (one.bands(a) == one.bands(b)).reshape(300, 3)
    assert np.array_equal(rows.all(axis=1), three.bands(a) == three.bands(b))


def test_blocks_change_nothing() -> None:
    elements = np.random.default_rng(1).integers(0, 1 << 63, 30_000, dtype=np.uint64)
    minhash = MinHash(bands=20, rows=5, seed=1)
    assert np.array_equal(minhash.bands(elements), minhash.bands(elements[::-1]))


def test_the_default_finds_enough_at_seven_tenths() -> None:
    assert found_probability(0.7, 20, 5) == pytest.approx(1 - (1 - 0.7**5) ** 20)
    assert found_probability(0.7, 20, 5) >= 0.95


@pytest.mark.parametrize("step", [1, 1 << 10, 1 << 16])
def test_bands_of_ranges_are_those_of_each_range(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minhash, "_BLOCK", step)
    random = np.random.default_rng(1)
    elements = random.integers(0, 1 << 63, 500, dtype=np.uint64)
    edges = np.sort(random.choice(500, 40, replace=False)).reshape(-1, 2)
    edges[-1, 1] = 500
    family = MinHash(20, 5, 1)
    found = family.bands_of_ranges(elements, edges[:, 0], edges[:, 1])
    assert np.array_equal(found, [family.bands(elements[a:b]) for a, b in edges])
