"""The order of samples: pure functions of a seed and a global sample index.

Nothing here keeps a state or a list of positions, so that training resumes from one integer.
"""

import copy
from collections.abc import Sequence
from math import gcd
from typing import Self

_MASK = (1 << 64) - 1
_ROUNDS = 6
# Weights become integer shares of this total: exact arithmetic, an error below 1e-12 of a weight.
_RESOLUTION = 1 << 40


def _mix(value: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def hash_key(*parts: int) -> int:
    """Return 64 bits that depend on every part and on their order."""
    key = 0x9E3779B97F4A7C15
    for part in parts:
        key = _mix((key + _mix(part & _MASK) + 0x9E3779B97F4A7C15) & _MASK)
    return key


def permute(index: int, size: int, key: int) -> int:
    """Return where a keyed permutation of 0 .. size - 1 sends index.

    A Feistel network on the smallest even number of bits that holds size, walked until the result
    is below size (Black and Rogaway 2002): a bijection without a table.
    """
    if not 0 <= index < size:
        raise ValueError(f"index is {index}; expected 0 to {size - 1}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = (
                right,
                left ^ (_mix((key + turn * 0x9E3779B97F4A7C15 ^ right) & _MASK) & mask),
            )
        index = left << half | right
        if index < size:
            return index


class Rows:
    """Which samples are the rows of a batch: sample k is row k mod batch of batch k // batch."""

    def __init__(self, batch: int) -> None:
        """Take the rows of a batch, over all ranks."""
        if batch < 1:
            raise ValueError(f"batch is {batch}; expected at least 1")
        self.batch_size = batch
        self._rank, self._world = 0, 1

    def for_rank(self, rank: int, world: int) -> Self:
        """Return the loader of one of `world` data-parallel ranks: rows rank, rank + world, ...

        The rows of all ranks together are the rows of this loader, whatever the number of ranks.
        """
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of {world}; expected 0 <= rank < world")
        if self.batch_size % world:
            raise ValueError(
                f"batch is {self.batch_size} windows; expected a multiple of {world} ranks; change "
                "train.tokens_per_step"
            )
        loader = copy.copy(self)
        loader._rank, loader._world = rank, world
        return loader

    def samples(self, step: int) -> list[int]:
        """Return the global indices of the samples of batch `step` that are this rank's."""
        if step < 0:
            raise ValueError(f"step is {step}; expected 0 or more")
        rows = range(self._rank, self.batch_size, self._world)
        return [step * self.batch_size + row for row in rows]


class Mixture:
    """Which source sample k comes from, and how many samples it gave before: two integers.

    The shares are met as evenly as integers allow: after any number of samples each source's count
    is within a few samples of its share. Source 0 has round(k p) of the first k samples, so it
    takes sample k where that number grows; what it leaves is numbered anew and shared among the
    others in the same way.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Take one weight a source: finite, not negative, not all zero."""
        if not weights:
            raise ValueError("weights is empty; expected one for each source")
        for index, weight in enumerate(weights):
            if not 0 <= weight < float("inf"):
                raise ValueError(
                    f"data.weights[{index}] is {weight}; expected a finite number >= 0"
                )
        total = sum(weights)
        if total <= 0:
            raise ValueError("weights are all 0; expected at least one above 0")
        shares = [round(weight / total * _RESOLUTION) for weight in weights]
        # shares[i] of what the sources before i have left, as numerator and denominator
        self._steps: list[tuple[int, int]] = []
        left = sum(shares)
        for share in shares:
            divisor = gcd(share, left) or 1
            self._steps.append((share // divisor, left // divisor))
            left -= share

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source, number of earlier samples from that source) of sample `index`."""
        if index < 0:
            raise ValueError(f"sample index is {index}; expected 0 or more")
        for source, (share, left) in enumerate(self._steps):
            if share == 0:
                continue
            before = _rounded(index, share, left)
            if _rounded(index + 1, share, left) > before:
                return source, before
            index -= before
        raise AssertionError("the last source with a share takes every sample that is left")


def _rounded(count: int, share: int, left: int) -> int:
    """Return count * share / left, rounded to the nearest integer."""
    return (2 * count * share + left) // (2 * left)
