"""Scores are judged within the narrowest stratum that is large enough."""

import numpy as np
import pytest

from transnormer.clean.selfclean.bands import keys_of, make_bands, robust_z


def test_a_source_with_its_own_level_is_judged_by_it() -> None:
    random = np.random.default_rng(1)
    values = np.concatenate([random.normal(0, 1, 200), random.normal(50, 2, 200)])
    keys = [keys_of("prose" if n < 200 else "code", "en", 1000) for n in range(400)]
    z = robust_z(values, keys, make_bands(values, keys))
    assert np.abs(z).max() < 5
    assert np.median(z[200:]) == pytest.approx(0, abs=1e-9)


def test_a_small_stratum_is_judged_by_the_wider_one() -> None:
    values = np.concatenate([np.random.default_rng(1).normal(0, 1, 100), [40.0, 41.0]])
    keys = [keys_of("large" if n < 100 else "small", "en", 1000) for n in range(102)]
    z = robust_z(values, keys, make_bands(values, keys))
    assert z[100:].min() > 20


def test_outliers_do_not_widen_the_band() -> None:
    values = np.concatenate([np.random.default_rng(1).normal(0, 1, 80), np.full(20, 1000.0)])
    keys = [keys_of("s", "en", 1000)] * 100
    assert make_bands(values, keys)[keys[0][0]].scale < 3


def test_equal_values_have_no_deviation() -> None:
    values = np.zeros(50)
    keys = [keys_of("s", "en", 10)] * 50
    assert robust_z(values, keys, make_bands(values, keys)).tolist() == [0.0] * 50
