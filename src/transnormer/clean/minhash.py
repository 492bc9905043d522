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
    """Signatures of one family of functions: h_i(x) = a_i x + b_i mod 2^32, a_i odd.

    x are the upper 32 bits of a hash of 64; two shingles of a document share them with a
    probability of 2^-32.
    """

    def __init__(self, bands: int, rows: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        shape = (bands * rows, 1)
        self._factors = random.integers(0, 1 << 31, shape, dtype=np.uint32) * 2 + 1
        self._offsets = random.integers(0, 1 << 32, shape, dtype=np.uint32)
        self._rows = random.integers(0, 1 << 63, rows, dtype=np.uint64) * 2 + 1
        self._bands = bands

    def bands(self, elements: np.ndarray) -> np.ndarray:
        """Return the bands of hashes, uint32 [bands].

        Args:
            elements: uint64 [hashes], not empty, well mixed; one that is there twice counts once.
        """
        return self._in_bands(self._lowest(_upper(elements)))

    def bands_of_ranges(
        self, elements: np.ndarray, first: np.ndarray, last: np.ndarray
    ) -> np.ndarray:
        """Return the bands of elements[first[i] : last[i]] for every i, uint32 [ranges, bands].

        Args:
            elements: uint64 [hashes], well mixed.
            first, last: int64 [ranges], the ranges in order; none is empty, none overlaps another.
        """
        upper = _upper(elements)
        lowest = np.empty((len(first), len(self._factors)), dtype=np.uint32)
        step = max(1, _BLOCK // len(self._factors))
        at = 0
        while at < len(first):
            end = max(at + 1, int(np.searchsorted(last, first[at] + step, side="right")))
            part = upper[first[at] : last[end - 1]]
            if end == at + 1:
                lowest[at] = self._lowest(part)
            else:
                edges = np.stack([first[at:end], last[at:end]], axis=1).reshape(-1) - first[at]
                values = self._values(part)
                # The last range runs to the end; every second segment lies between two ranges.
                lowest[at:end] = np.minimum.reduceat(values, edges[:-1], axis=1)[:, ::2].T
            at = end
        return self._in_bands(lowest)

    def _values(self, upper: np.ndarray) -> np.ndarray:
        values = self._factors * upper
        values += self._offsets
        return values

    def _lowest(self, upper: np.ndarray) -> np.ndarray:
        lowest = np.full(len(self._factors), np.iinfo(np.uint32).max, dtype=np.uint32)
        step = max(1, _BLOCK // len(self._factors))
        for start in range(0, len(upper), step):
            values = self._values(upper[start : start + step])
            np.minimum(lowest, values.min(axis=1), out=lowest)
        return lowest

    def _in_bands(self, lowest: np.ndarray) -> np.ndarray:
        rows = lowest.astype(np.uint64).reshape(*lowest.shape[:-1], self._bands, -1)
        return (mix((rows * self._rows).sum(axis=-1)) >> np.uint64(32)).astype(np.uint32)


def _upper(elements: np.ndarray) -> np.ndarray:
    return (elements >> np.uint64(32)).astype(np.uint32)
