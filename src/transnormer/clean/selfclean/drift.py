"""Whether the corpus becomes poorer: what a round does to its words, bytes and sources."""

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from transnormer.clean.words import split_words

_SAMPLE_WORDS = 1 << 20


class Diversity:
    """Collects measures of a corpus, a text at a time."""

    def __init__(self) -> None:
        self._words: list[np.ndarray] = []
        self._num_words = 0
        self._pairs = np.zeros(1 << 16, dtype=np.int64)
        self.sources: Counter[str] = Counter()

    def add(self, text: str, source: str) -> None:
        """Count a text."""
        self.sources[source] += 1
        if self._num_words < _SAMPLE_WORDS:
            hashes = split_words(text).hashes[: _SAMPLE_WORDS - self._num_words]
            self._words.append(hashes)
            self._num_words += len(hashes)
        data = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
        pairs = data[:-1].astype(np.int64) * 256 + data[1:]
        self._pairs += np.bincount(pairs, minlength=1 << 16)

    def measures(self) -> dict[str, float]:
        """Different words a word (of the first million), and bits of the byte pairs' entropy."""
        words = np.concatenate(self._words) if self._words else np.zeros(0, dtype=np.uint64)
        shares = self._pairs[self._pairs > 0] / max(1, self._pairs.sum())
        return {
            "type_token_ratio": len(np.unique(words)) / max(1, len(words)),
            "byte_pair_entropy": float(-(shares * np.log2(shares)).sum()),
        }


def divergence(before: Counter[str], after: Counter[str]) -> float:
    """KL of the sources after from those before, in bits; sources that vanished count by a half."""
    total_before, total_after = before.total(), after.total()
    if not total_before or not total_after:
        return 0.0
    value = 0.0
    for name, count in before.items():
        p, q = count / total_before, max(after[name], 0.5) / total_after
        value += p * math.log2(p / q)
    return value


def drop_rates(before: Counter[str], dropped: Iterable[str]) -> dict[str, float]:
    """The share of each source's documents that a round drops."""
    gone = Counter(dropped)
    return {name: gone[name] / count for name, count in sorted(before.items())}
