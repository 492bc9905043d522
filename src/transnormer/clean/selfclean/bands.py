"""Which scores are out of the ordinary, each document judged among its likes.

Scores depend on source, language and length more than on quality, so that one threshold for all
drops verse and code first. Within a stratum (source, language, length by powers of four) a score x
becomes the robust z = (x - median) / (1.4826 MAD). A stratum of few documents is judged by the next
wider one: (language, length), (language), all.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

_FEWEST = 30
# 1.4826 times the median absolute deviation is the standard deviation of a normal distribution.
_NORMAL = 1.4826
_LEAST_SCALE = 1e-6

Key = tuple[Hashable, ...]


class Band(NamedTuple):
    """What is ordinary in a stratum: the median and the scale of a score."""

    median: float
    scale: float


def keys_of(source: str, language: str, size: int) -> list[Key]:
    """The strata that a document is in, the narrowest first."""
    length = (size.bit_length() + 1) // 2
    return [(source, language, length), (language, length), (language,), ()]


def make_bands(values: np.ndarray, keys: Sequence[Sequence[Key]]) -> dict[Key, Band]:
    """Bands of every stratum that holds enough documents; that of all always.

    Args:
        values: float [documents].
        keys: keys_of each document.
    """
    members: dict[Key, list[int]] = {(): list(range(len(values)))}
    for number, mine in enumerate(keys):
        for key in mine[:-1]:
            members.setdefault(key, []).append(number)
    bands = {}
    for key, numbers in members.items():
        if key and len(numbers) < _FEWEST:
            continue
        found = values[numbers]
        median = float(np.median(found)) if len(found) else 0.0
        scale = _NORMAL * float(np.median(np.abs(found - median))) if len(found) else 1.0
        bands[key] = Band(median, max(scale, _LEAST_SCALE))
    return bands


def robust_z(
    values: np.ndarray, keys: Sequence[Sequence[Key]], bands: dict[Key, Band]
) -> np.ndarray:
    """Each value's z in the narrowest of its strata that has a band, float [documents]."""
    result = np.empty(len(values))
    for number, mine in enumerate(keys):
        band = bands[next(key for key in mine if key in bands)]
        result[number] = (values[number] - band.median) / band.scale
    return result
