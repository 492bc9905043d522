"""MinHash signatures in bands, four bytes a band.

The signature of a set of shingles X is min over x in X of h_i(x) for bands * rows hash functions;
two sets agree in one of them with the probability of their Jaccard index J (Broder 1997). A band is
`rows` of them hashed to 32 bits: two documents are candidates when they share any band, which
happens with the probability 1 - (1 - J^rows)^bands. What two documents share by the chance of the
32 bits is removed by the exact check that follows.
"""

import numpy as np

from transnormer.clean.words import mix

# Hash functions times shingles worked on at a time, so that they stay in a core's cache.
_BLOCK = 1 << 16


def found_probability(similarity: float, bands: int, rows: int) -> float:
    """The probability that two sets of this Jaccard index become candidates."""
    return 1.0 - (1.0 - similarity**rows) ** bands


class MinHash:
    """Signatures of one family of functions: h_i(x) = (a_i x + b_i mod 2^64) >> 32, a_i odd."""

    def __init__(self, bands: int, rows: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        shape = (bands * rows, 1)
        self._factors = random.integers(0, 1 << 63, shape, dtype=np.uint64) * 2 + 1
        self._offsets = random.integers(0, 1 << 63, shape, dtype=np.uint64)
        self._rows = random.integers(0, 1 << 63, rows, dtype=np.uint64) * 2 + 1
        self._bands = bands

    def bands(self, elements: np.ndarray) -> np.ndarray:
        """Return the bands of a set of hashes, uint32 [bands]; elements is uint64, not empty."""
        lowest = np.full(len(self._factors), np.iinfo(np.uint64).max, dtype=np.uint64)
        step = max(1, _BLOCK // len(self._factors))
        for start in range(0, len(elements), step):
            values = self._factors * elements[start : start + step] + self._offsets
            np.minimum(lowest, values.min(axis=1), out=lowest)
        rows = (lowest >> np.uint64(32)).reshape(self._bands, -1)
        return (mix((rows * self._rows).sum(axis=1)) >> np.uint64(32)).astype(np.uint32)
